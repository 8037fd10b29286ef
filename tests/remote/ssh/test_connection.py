"""Ways to a host, and ways to fail, against a real sshd."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sshd import (
    Relay,
    Sshd,
    cmdline,
    free_port,
    laptop,  # noqa: F401
    one_line,
    processes_naming,
)
from waiting import until

from remote.ssh import connection, fabric_connection, hosts
from remote.ssh.connection import Remote, connect
from remote.ssh.errors import AuthenticationFailed, Unreachable
from remote.ssh.host_keys import UnknownHostKey
from surgvqa.errors import SurgvqaError, UsageError

pytestmark = pytest.mark.slow


# --- ways to a host, and ways to fail --------------------------------------------------------------------------------


def test_a_proxy_jump_is_as_strict_as_the_host(laptop):  # noqa: F811
    """gpuhost is reached through `door`; both keys are checked, each with its own error."""
    door = Sshd(laptop.root / "door", name="door").start()
    try:
        (door.root / "authorized_keys").write_text((laptop.server.root / "user_key.pub").read_text())
        own = laptop.server.config.read_text()
        door_text = own.replace("gpuhost", "door").replace(f"Port {laptop.server.port}", f"Port {door.port}")
        laptop.server.config.write_text(own.rstrip() + "\n ProxyJump door\n" + door_text)
        with pytest.raises(UnknownHostKey, match="via door"):
            laptop.connect()
        connect("gpuhost", laptop.workspace, accept_new_host_key=True).close()
        with laptop.connect() as remote:
            assert remote.call("probe", venv="venv")["workspace"] == str(laptop.there)
        (laptop.workspace / "merged").mkdir()
        (laptop.workspace / "merged" / "config.json").write_text("{}")
        laptop.here("upload", "gpuhost", "--model_name_or_path", "merged")  # OpenSSH's streams take the same way
        assert (laptop.there / "merged" / "config.json").read_text() == "{}"
        door.stop()
        with pytest.raises(Unreachable, match="via door"):
            laptop.connect()
    finally:
        door.stop()


def test_a_proxy_command_runs_in_a_shell_with_ssh_s_tokens(laptop, monkeypatch):  # noqa: F811
    """Another port than 22, ~, a variable and a redirection: as OpenSSH does it; it ends with the connection."""
    relay = laptop.root / "laptop_home" / "relay.py"
    relay.write_text(
        "import os, socket, sys, threading\n"
        "there = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "def copy():\n"
        "    while data := os.read(0, 65536):\n"
        "        there.sendall(data)\n"
        "threading.Thread(target=copy, daemon=True).start()\n"
        "while data := there.recv(65536):\n"
        "    os.write(1, data)\n"
    )
    monkeypatch.setenv("WHERE", str(laptop.root))
    log = laptop.root / "proxy %.log"
    command = f'{sys.executable} ~/relay.py %h %p %r %n >/dev/fd/1 2>"$WHERE/proxy %%.log"'
    laptop.server.write_config(more=f"ProxyCommand {command}")
    with laptop.connect() as remote:
        remote.call("probe", venv="venv")
        (proxy,) = processes_naming(relay)
        assert cmdline(proxy).split(b"\0")[2:6] == [b"127.0.0.1", b"%d" % laptop.server.port, b"root", b"gpuhost"]
    until(lambda: not processes_naming(relay))
    assert log.exists()
    laptop.server.write_config(more="ProxyCommand sh -c 'exit 3'")
    with pytest.raises(Unreachable, match=r"connection lost.*; ProxyCommand ended with 3"):  # noticed, not waited for
        laptop.connect()
    laptop.server.write_config(more="ProxyCommand no-such-program %h %p")
    with pytest.raises(Unreachable, match=r"connection lost.*no-such-program: not found"):
        laptop.connect()


@pytest.mark.parametrize("pattern", ["keys/%r@%h", "keys/of_%n", "${KEYS}/100%%"])
def test_identity_files_have_ssh_s_tokens(laptop, monkeypatch, pattern):  # noqa: F811
    keys = laptop.root / "laptop_home" / "keys"
    keys.mkdir()
    monkeypatch.setenv("KEYS", str(keys))
    user = laptop.connect().host.user
    for name in (f"{user}@127.0.0.1", "of_gpuhost", "100%"):
        (keys / name).write_text((laptop.server.root / "user_key").read_text())
        (keys / name).chmod(0o600)
    text = laptop.server.config.read_text()
    pattern = pattern if pattern.startswith("$") else f"~/{pattern}"
    laptop.server.config.write_text(text.replace(str(laptop.server.root / "user_key"), pattern))
    laptop.connect().close()


def test_a_proxy_jump_to_itself_is_one_line(laptop):  # noqa: F811
    """`Host *` with a ProxyJump catches the jump host too."""
    text = laptop.server.config.read_text()
    laptop.server.config.write_text(f"{text}\nHost door\n HostName 127.0.0.1\nHost *\n ProxyJump door\n")
    with pytest.raises(UsageError, match=r"circle.*ProxyJump none"):
        laptop.connect()


@pytest.mark.parametrize(
    ("hop", "address", "port"),
    [
        ("root@[::1]:2222", "::1", 2222),
        ("[fe80::1]", "fe80::1", 22),
        ("ssh://me@10.0.0.1:23/", "10.0.0.1", 23),
        ("me@10.0.0.1", "10.0.0.1", 22),
    ],
)
def test_a_jump_host_may_be_an_ipv6_address(tmp_path, monkeypatch, hop, address, port):
    (tmp_path / "config").write_text("")
    monkeypatch.setenv("SURGVQA_SSH_CONFIG", str(tmp_path / "config"))
    found = fabric_connection.jump_host(hop, "gpuhost")
    assert (found.hostname, found.port) == (address, port)


def test_every_failure_is_one_line_that_says_what_to_do(laptop, monkeypatch):  # noqa: F811
    def failure(kind, name="gpuhost"):
        with pytest.raises(kind) as caught:
            connect(name, laptop.workspace)
        return one_line(caught.value)

    (laptop.server.root / "authorized_keys").write_text("")
    assert "ssh-copy-id" in failure(AuthenticationFailed)
    laptop.server.write_config(port=free_port())
    assert "connection refused" in failure(Unreachable)
    monkeypatch.setattr("remote.ssh.timeouts.CONNECT_TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
        laptop.server.write_config(port=full.getsockname()[1])  # no further connection is accepted
        assert "no answer in 1 s" in failure(Unreachable)
    assert "cannot start with a dash" in failure(UsageError, "-oProxyCommand=touch pwned")
    laptop.server.config.write_text("Host gpuhost\n Nonsense yes\n")
    assert "ssh does not accept it" in failure(UsageError)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "install OpenSSH" in failure(UsageError)


def test_an_encrypted_key_asks_for_the_agent(laptop):  # noqa: F811
    key = laptop.server.root / "user_key"
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", key], check=True)
    with pytest.raises(AuthenticationFailed, match="ssh-add"):
        laptop.connect()


@pytest.mark.parametrize("late_s", [0.0, 0.7])  # late: the host's shell has ended before it is sent anything
def test_a_host_without_python_says_so(laptop, monkeypatch, late_s):  # noqa: F811
    payload = connection.payload
    monkeypatch.setattr(connection, "payload", lambda request: time.sleep(late_s) or payload(request))
    laptop.host(python="/no where/python3")
    with laptop.connect() as remote, pytest.raises(SurgvqaError, match=r"no /no where/python3 there.*hosts\.toml"):
        remote.call("probe", venv="venv")


def test_a_talkative_login_shell_and_an_old_looking_workspace_name(laptop):  # noqa: F811
    """Output of .bashrc before ours, and a workspace name that no shell should see."""
    laptop.server.stop()
    laptop.server.extra = 'ForceCommand echo welcome; echo $((1+1)); eval "$SSH_ORIGINAL_COMMAND"'
    laptop.server.start()
    laptop.host(workspace="~/it's a $(touch pwned) `x` dir", python=sys.executable)
    with laptop.connect() as remote:
        facts = remote.call("probe", venv="venv")
    assert facts["workspace"] == str(laptop.server.home / "it's a $(touch pwned) `x` dir")
    assert not list(laptop.root.rglob("pwned"))


def test_the_python_of_a_home_and_one_that_is_too_old(laptop):  # noqa: F811
    """~ is the home there; Python 3.6 cannot even read the agent."""
    tools = laptop.server.home / "my tools"
    tools.mkdir()
    (tools / "python3").symlink_to(sys.executable)
    laptop.host(python="~/my tools/python3")
    with laptop.connect() as remote:
        remote.call("probe", venv="venv")
    old = tools / "old"
    shown = "import sys; sys.version_info = (3, 6, 9); sys.version = '3.6.9 (default)'"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{shown}; exec(sys.argv[-1])" "$@"\n')
    old.chmod(0o755)
    laptop.host(python="~/my tools/old")
    with laptop.connect() as remote, pytest.raises(SurgvqaError, match=r"Python 3\.6\.9 is too old.*hosts\.toml"):
        remote.call("probe", venv="venv")


def test_a_silent_host_is_given_up(laptop, monkeypatch):  # noqa: F811
    relay = Relay(laptop.server.port)
    laptop.server.write_config(port=relay.port)
    monkeypatch.setattr("remote.ssh.timeouts.CHANNEL_TIMEOUT_S", 1)
    monkeypatch.setattr("remote.ssh.timeouts.SILENCE_S", 1.0)
    with laptop.connect() as remote:
        relay.freeze()
        with pytest.raises(Unreachable, match="connection lost"):  # with timeouts of a second, so not for ever
            list(remote.stream("probe", venv="venv"))
    relay.close()


# --- manners ---------------------------------------------------------------------------------------------------------


def test_the_command_line_has_surgvqas_manners(tmp_path):
    def said(*words):
        return subprocess.run([sys.executable, "-m", "remote", *words], capture_output=True, text=True, cwd=tmp_path)

    assert said("--help").returncode == 0 and "example:" in said("upload", "--help").stdout
    wrong = said("runs")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stderr.startswith("surgvqa-remote runs: ")
    assert said("launch", "h").returncode == 2


def test_nothing_heavy_is_imported():
    code = (
        "import sys, remote.cli.commands, remote.upload.command, remote.jobs.launch, remote.jobs.fetch, remote.setup; "
        "bad = {'torch', 'numpy', 'transformers', 'textual'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_remote_has_one_owner_but_two_hosts_at_once_work(laptop):  # noqa: F811
    other = Sshd(laptop.root / "other", name="gpuhost").start()
    try:
        first = laptop.connect()
        other.trust()
        second = Remote(hosts.resolve("gpuhost", laptop.workspace))
        assert first.call("probe", venv="v")["workspace"] == str(laptop.there)
        os.environ["SURGVQA_SSH_CONFIG"] = str(other.config)
        second = connect("gpuhost", Path(laptop.workspace))
        assert second.call("probe", venv="v")["workspace"] == str(other.home / "surgvqa")
        assert first.call("probe", venv="v")["workspace"] == str(laptop.there)
        first.close()
        second.close()
    finally:
        other.stop()


# --- login shells and ssh_config -------------------------------------------------------------------------------------


def login_shell(laptop, command):  # noqa: F811
    """`command` runs before what was asked for, as in a ~/.bashrc."""
    laptop.server.stop()
    laptop.server.extra = f'ForceCommand {command}; eval "$SSH_ORIGINAL_COMMAND"'
    laptop.server.start()


def test_a_slow_login_shell_is_waited_for(laptop, monkeypatch):  # noqa: F811
    """For longer than a silence that would end the connection later."""
    login_shell(laptop, "sleep 1.5")
    monkeypatch.setattr("remote.ssh.timeouts.SILENCE_S", 1.0)
    with laptop.connect() as remote:
        assert list(remote.stream("probe", venv="venv"))


@pytest.mark.parametrize(
    "command", ["echo loading modules; sleep 600", "while :; do echo loading modules; sleep 0.2; done"]
)
def test_a_login_shell_that_is_too_slow_is_named(laptop, command):  # noqa: F811
    login_shell(laptop, command)
    laptop.host(python=sys.executable, login_timeout_s=1)
    with laptop.connect() as remote, pytest.raises(Unreachable, match=r"logged in.*loading modules.*login_timeout_s"):
        remote.call("probe", venv="venv")


@pytest.mark.parametrize(
    "line",
    ["SessionType none", "SessionType subsystem", "StdinNull yes", "ForkAfterAuthentication yes", "RemoteCommand ls"],
)
def test_bulk_streams_override_what_would_leave_them_without_a_command(laptop, line):  # noqa: F811
    laptop.server.write_config(more=line)
    (laptop.workspace / "merged").mkdir()
    (laptop.workspace / "merged" / "config.json").write_text("{}")
    laptop.here("upload", "gpuhost", "--model_name_or_path", "merged", "--patience_s", "5")
    assert (laptop.there / "merged" / "config.json").read_text() == "{}"


def test_a_login_shell_that_reads_our_input_is_named(laptop):  # noqa: F811
    python = laptop.root / "python"
    python.write_text(f'#!/bin/sh\nread answer\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    laptop.host(python=str(python))
    with laptop.connect() as remote, pytest.raises(SurgvqaError, match="reads the standard input that is ours"):
        remote.call("runs")
