"""How packets leave this computer: paramiko obeys ssh_config as OpenSSH does."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from shards import checkpoint
from sshd import laptop  # noqa: F401

from remote.ssh.connection import connect

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 needs Linux")


def sources(laptop) -> set[str]:  # noqa: F811
    """The addresses that the host has seen logins from."""
    return set(re.findall(r"Accepted publickey for \S+ from (\S+)", (laptop.server.root / "sshd.log").read_text()))


def test_the_bind_address_holds_for_both_ways(laptop):  # noqa: F811
    laptop.server.write_config(more="BindAddress 127.0.0.2\n AddressFamily inet")
    with connect("gpuhost", laptop.workspace) as remote:
        assert remote.ask("probe", venv="venv")["writable"]
    assert sources(laptop) == {"127.0.0.2"}
    checkpoint(laptop.workspace / "merged", {"a.safetensors": 1000})
    laptop.here("upload", "gpuhost", "--model_name_or_path", "merged")
    assert sources(laptop) == {"127.0.0.2"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("BindAddress 192.0.2.9", "BindAddress 192.0.2.9 of ssh's configuration cannot be used"),
        ("BindInterface nowhere9", "BindInterface nowhere9 of ssh's configuration cannot be used"),
        ("AddressFamily inet6", "AddressFamily inet6 of ssh's configuration: 127.0.0.1 has no such address"),
    ],
)
def test_a_way_that_is_not_there_is_refused_as_ssh_refuses_it(laptop, line, said):  # noqa: F811
    laptop.server.write_config(more=line)
    ssh = ["ssh", "-F", str(laptop.server.config), "-o", "BatchMode=yes", "gpuhost", "true"]
    assert subprocess.run(ssh, capture_output=True).returncode == 255
    done = laptop.command("runs", "gpuhost", "--patience_s", "0", check=1)
    assert said in done.stderr and not sources(laptop)
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_authority_for_host_keys_is_named(laptop):  # noqa: F811
    key = laptop.server.known_hosts.read_text().split(maxsplit=1)[1]
    laptop.server.known_hosts.write_text(f"@cert-authority gpuhost {key}")
    assert "certificate authority" in laptop.command("runs", "gpuhost", check=1).stderr
