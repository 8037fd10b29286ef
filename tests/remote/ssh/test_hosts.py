"""Hosts from ssh_config and from hosts.toml."""

from __future__ import annotations

import sys

import pytest
from sshd import (
    free_port,
    laptop,  # noqa: F401
    one_line,
)

from remote.ssh import hosts
from surgvqa.errors import UsageError

pytestmark = pytest.mark.slow


def test_hosts_come_from_ssh_and_from_hosts_toml(laptop, tmp_path):  # noqa: F811
    included = tmp_path / "more"
    included.write_text(f"Host other other2 *.wild\n HostName 127.0.0.9\n Port {free_port()}\n")
    laptop.server.config.write_text(f"Include {included}\n" + laptop.server.config.read_text())
    laptop.host(price_per_hour=1.29, gpus="1x A100 40 GB", python=sys.executable)
    listed = {h["name"]: h for h in laptop.here("hosts", "--check")["hosts"]}
    assert list(listed) == ["gpuhost", "other", "other2"]
    assert listed["gpuhost"]["state"] == "reachable" and listed["gpuhost"]["price_per_hour"] == 1.29
    assert listed["gpuhost"]["skew"] and listed["other"]["hostname"] == "127.0.0.9"
    assert listed["other"]["state"] == "unreachable"
    assert listed["gpuhost"]["clock"] is None  # it is this machine's


@pytest.mark.parametrize(
    ("theirs", "said"),
    [(100.5, None), (95.0, None), (161.5, "1 min 00 s ahead of this one"), (40.0, "1 min 00 s behind"), ("x", None)],
)
def test_a_wrong_clock_is_named_whatever_the_answer_took(theirs, said):
    from remote.setup import wrong_clock

    found = wrong_clock(theirs, 100.0, 101.5)
    assert said in found and "timedatectl" in found if said else found is None


def test_host_lines_are_read_as_ssh_reads_them(tmp_path, monkeypatch):
    config = tmp_path / "config"
    config.write_text(
        'Host\ta "b c" # not this\nhost=d\n  Host = e f\n#Host g\nHost "h\nInclude\t"more"\nMatch host i\n'
    )
    (tmp_path / "more").write_text("Host j !k *.l\n")
    monkeypatch.setenv("SURGVQA_SSH_CONFIG", str(config))
    assert hosts.ssh_config_names() == ["a", "b c", "d", "e", "f", "j"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a]\nworkspce = 'x'", "unknown key workspce; did you mean workspace?"),
        ("[a]\nport = 'x'", "port is 'x', expected int"),
        ("[a]\nenvironment = 1", "expected a table of texts"),
        ("[a]\nlogin_timeout_s = 0", "expected seconds between 1 and 3600"),
        ("[a]\nworkspace = ''", "workspace is '', expected text"),
        ('[a]\npython = "a\\u0000b"', "expected text"),
        ("[a]\nport = 70000", "expected 1 to 65535"),
        ("[a]\nprice_per_hour = nan", "expected a price"),
        ('[a.environment]\n"A=B" = "c"', "cannot be a variable"),
        ("a = 1", "expected a table"),
        ("[a", "not valid TOML"),
    ],
)
def test_a_wrong_hosts_toml_is_named(tmp_path, text, said):
    (tmp_path / "hosts.toml").write_text(text)
    with pytest.raises(UsageError, match=r"hosts\.toml") as caught:
        hosts.read_hosts_files(tmp_path)
    assert said in one_line(caught.value)


def test_one_wrong_table_does_not_take_the_other_hosts_away(laptop):  # noqa: F811
    file = laptop.workspace / "hosts.toml"
    file.write_text(file.read_text() + "[other]\nport = 'x'\n[third]\naddress = '192.0.2.7'\n")
    assert laptop.here("runs", "gpuhost")["runs"] == []
    listed = {row["name"]: row for row in laptop.here("hosts")["hosts"]}
    assert listed["third"]["hostname"] == "192.0.2.7" and "port is 'x'" in listed["other"]["error"]
    assert "error" not in listed["gpuhost"]
    with pytest.raises(UsageError, match=r"\[other\] port is 'x'"):
        hosts.resolve("other", laptop.workspace)
