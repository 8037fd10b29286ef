"""Host keys of a real sshd: unknown, remembered, changed, revoked, certified."""

from __future__ import annotations

import subprocess

import pytest
from sshd import (
    laptop,  # noqa: F401
    one_line,
)

from remote.ssh.connection import connect
from remote.ssh.errors import ChangedHostKey, Unreachable
from remote.ssh.host_keys import UnknownHostKey

pytestmark = pytest.mark.slow


def test_an_unknown_key_is_refused_shown_and_remembered_when_told(laptop):  # noqa: F811
    laptop.server.known_hosts.unlink()
    shown = subprocess.run(
        ["ssh-keygen", "-lf", laptop.server.root / "host_key.pub"], capture_output=True, text=True
    ).stdout.split()[1]
    with pytest.raises(UnknownHostKey) as refused:
        laptop.connect()
    assert refused.value.fingerprint == shown and shown in one_line(refused.value)
    assert not laptop.server.known_hosts.exists()
    failed = laptop.command("runs", "gpuhost", check=1).stderr
    assert shown in failed and "--accept-new-host-key" in failed and failed.count("\n") == 1
    laptop.here("runs", "gpuhost", "--accept-new-host-key")
    assert laptop.server.known_hosts.read_text().startswith("|1|")  # hashed, as ssh_config asks
    laptop.connect().close()
    words = ["ssh", "-F", laptop.server.config, "-o", "BatchMode=yes", "gpuhost", "true"]
    assert subprocess.run(words).returncode == 0  # OpenSSH reads it too


def test_a_remembered_key_leaves_the_others_as_they_are(laptop):  # noqa: F811
    """known_hosts that an editor left without a newline at its end."""
    other = f"elsewhere {(laptop.server.root / 'host_key.pub').read_text().strip()}"
    laptop.server.known_hosts.write_text(other)
    connect("gpuhost", laptop.workspace, accept_new_host_key=True).close()
    first, second = laptop.server.known_hosts.read_text().splitlines()
    assert first == other and second.startswith("|1|")


def test_a_changed_key_is_refused_always(laptop):  # noqa: F811
    laptop.server.stop()
    laptop.server.new_host_key()
    laptop.server.start()
    with pytest.raises(ChangedHostKey, match="HAS CHANGED"):
        connect("gpuhost", laptop.workspace, accept_new_host_key=True)
    before = laptop.server.known_hosts.read_text()
    assert "CHANGED" in laptop.command("runs", "gpuhost", "--accept-new-host-key", check=1).stderr
    assert laptop.server.known_hosts.read_text() == before


def test_a_known_key_of_another_kind_than_the_host_shows_first(laptop):  # noqa: F811
    """Two host keys there, only the second kind is known here: that one is asked for."""
    rsa = laptop.server.root / "rsa_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", rsa], check=True)
    laptop.server.stop()
    laptop.server.extra = f"HostKey {rsa}"
    laptop.server.start()
    laptop.server.known_hosts.write_text(f"gpuhost {rsa.with_suffix('.pub').read_text()}")
    laptop.connect().close()


def test_a_revoked_key_is_refused(laptop):  # noqa: F811
    laptop.server.known_hosts.write_text("@revoked " + laptop.server.known_hosts.read_text())
    with pytest.raises(ChangedHostKey, match="revoked"):
        connect("gpuhost", laptop.workspace, accept_new_host_key=True)


def unhashed(laptop, name):  # noqa: F811
    """Writes the host's key under that name, and no alias into ssh_config."""
    key = (laptop.server.root / "host_key.pub").read_text()
    laptop.server.known_hosts.write_text(f"{name} {key}")
    text = laptop.server.config.read_text()
    laptop.server.config.write_text(text.replace(f" HostKeyAlias {laptop.server.name}\n", ""))


def test_a_key_that_is_known_without_the_port_is_known(laptop):  # noqa: F811
    """As OpenSSH reads known_hosts for a host on another port than 22; another key there counts for nothing."""
    unhashed(laptop, "127.0.0.1")
    laptop.connect().close()
    before = laptop.server.known_hosts.read_text()
    laptop.server.stop()
    laptop.server.new_host_key()
    laptop.server.start()
    with pytest.raises(UnknownHostKey):
        laptop.connect()
    laptop.server.known_hosts.write_text(f"@revoked * {(laptop.server.root / 'host_key.pub').read_text()}{before}")
    with pytest.raises(ChangedHostKey, match="revoked"):
        laptop.connect()


@pytest.mark.parametrize(
    ("prints", "known"), [('echo "$3 $KEY"', True), ('[ "$1" = HOSTNAME ] && echo "$3 $2 $4"', True), ("exit 1", False)]
)
def test_a_known_hosts_command_is_asked(laptop, monkeypatch, prints, known):  # noqa: F811
    """With the host's name, and, once it is shown, its key."""
    monkeypatch.setenv("KEY", (laptop.server.root / "host_key.pub").read_text().strip())
    script = laptop.root / "known hosts"
    script.write_text(f"#!/bin/sh\n{prints}\n")
    script.chmod(0o755)
    laptop.server.known_hosts.unlink()
    laptop.server.write_config(more=f'KnownHostsCommand "{script}" %I %t %H %K')
    if known:
        laptop.connect().close()
    else:
        with pytest.raises(UnknownHostKey):
            laptop.connect()


def few(laptop, setting):  # noqa: F811
    """An sshd with that setting in place of the kit's."""
    laptop.server.stop()
    laptop.server.limits = setting
    laptop.server.start()


def test_a_host_that_lets_a_connection_have_one_session(laptop):  # noqa: F811
    few(laptop, "MaxSessions 1\nMaxStartups 100")
    with laptop.connect() as remote:
        remote.ask("probe", venv="venv")  # this agent waits for the next question
        first = remote.stream("gpus", venv="venv", watch=0.1)
        next(first)
        assert remote.call("runs")["runs"] == [] and remote.ask("probe", venv="venv")["workspace"]
        assert len(remote._further) == 2 and next(first)
        first.close()
    few(laptop, "MaxSessions 0\nMaxStartups 100")
    with laptop.connect() as remote, pytest.raises(Unreachable, match="opens no channel"):
        remote.call("runs")


def test_a_host_that_lets_two_log_in_at_once(laptop):  # noqa: F811
    few(laptop, "MaxStartups 2")
    (laptop.workspace / "merged").mkdir()
    (laptop.workspace / "merged" / "config.json").write_text("{}")
    laptop.here("upload", "gpuhost", "--model_name_or_path", "merged", "--patience_s", "60")
    assert (laptop.there / "merged" / "config.json").read_text() == "{}"
