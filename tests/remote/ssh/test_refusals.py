"""Only an answer of the host is a refusal; a network that is away or cut is worth a retry."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from types import SimpleNamespace

import paramiko
import pytest
from sshd import TRAIN, Relay, free_port, laptop, stub_train  # noqa: F401
from waiting import until

from remote.cli.main import main
from remote.jobs import run_events
from remote.ssh import patience, timeouts
from remote.ssh.connection import Remote, connect
from remote.ssh.errors import AuthenticationFailed, SlowLogin, Unreachable, explain_ssh
from remote.ssh.hosts import resolve
from remote.ssh.keys import SshKeys
from remote.ssh.patience import Patience
from remote.ssh.process import AgentProcess
from remote.ssh.replies import Replies

pytestmark = pytest.mark.slow


@pytest.fixture
def relay(laptop, monkeypatch):  # noqa: F811
    """Between the laptop and its host, with short timeouts and no pauses; answers are patient."""
    for name in ("CONNECT_TIMEOUT_S", "CHANNEL_TIMEOUT_S", "SILENCE_S"):
        monkeypatch.setattr(timeouts, name, 1)
    monkeypatch.setattr(patience, "BACKOFF_S", (0,))
    one = Relay(laptop.server.port)
    laptop.server.write_config(port=one.port)
    yield one
    one.close()


@pytest.mark.parametrize("how", ["cut", "stalled"])
def test_a_network_that_breaks_at_any_stage_is_no_refusal(laptop, relay, monkeypatch, how):  # noqa: F811
    """Before the banner, within it, while keys are exchanged, while we log in, within the request and behind it."""
    login: list[int] = []
    authenticate = SshKeys.authenticate

    def watched(self, transport):
        login.append(relay.passed)
        done = authenticate(self, transport)
        login.append(relay.passed)
        return done

    with monkeypatch.context() as measuring:
        measuring.setattr(SshKeys, "authenticate", watched)
        for name in ("CONNECT_TIMEOUT_S", "CHANNEL_TIMEOUT_S", "SILENCE_S"):
            measuring.setattr(timeouts, name, 30)  # one attempt, also on a busy machine
        with laptop.connect() as remote:
            remote.call("runs")
            whole = relay.passed
    began, ended = login
    assert 100 < began < ended < whole
    told: list[str] = []
    places = [0, 100, (began + ended) // 2, (ended + whole) // 2]
    if how == "cut":  # a stall costs a second each
        places += [9, (began + 100) // 2, began + 9, whole]
    for at in places:
        relay.break_next(how, at)
        with connect("gpuhost", laptop.workspace, patience=Patience(60, told.append)) as remote:
            assert remote.call("runs")["runs"] == []
    # At the end, the answer may come before the network breaks, or fewer bytes pass than the first time.
    assert relay.broken >= len(places) - (how == "cut") and len(told) >= len(places) - 1
    assert not any("the host refused" in line or "KEY HAS" in line for line in told)


@pytest.mark.parametrize(
    ("error", "connected", "raised"),
    [
        (EOFError(), True, Unreachable),  # the socket is closed, and paramiko's thread has not noticed yet
        (ConnectionResetError(), True, Unreachable),
        (paramiko.SSHException("No existing session"), True, Unreachable),
        (paramiko.AuthenticationException("Authentication timeout."), True, Unreachable),
        (paramiko.AuthenticationException("Authentication failed."), False, Unreachable),
        (paramiko.AuthenticationException("Authentication failed."), True, AuthenticationFailed),
        (paramiko.BadAuthenticationType("Bad authentication type", ["password"]), True, AuthenticationFailed),
    ],
)
def test_only_the_hosts_no_is_a_refusal(monkeypatch, error, connected, raised):
    """However the connection ends while a key is shown."""
    keys = SshKeys(SimpleNamespace(name="gpuhost", target="gpuhost", user="ubuntu", hostname="192.0.2.7", port=22))
    monkeypatch.setattr(keys, "_keys", lambda: iter([None]))

    def show_key(user, key):
        raise error

    with pytest.raises(raised):
        keys.authenticate(SimpleNamespace(auth_publickey=show_key, is_active=lambda: connected, goodbye=""))


def packet(payload: bytes) -> bytes:
    """An SSH packet before keys are exchanged (RFC 4253, 6)."""
    padding = 16 - (len(payload) + 5) % 8
    return struct.pack(">IB", len(payload) + padding + 1, padding) + payload + bytes(padding)


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\xfe no SSH\r\n",
        b"SSH-2.0-x\r\n" + bytes(range(7, 107)),
        b"SSH-2.0-x\r\n" + packet(b"\1" + struct.pack(">II", 2, 5) + b"\xff\xfebad" + bytes(4)),  # a disconnection
        b"SSH-2.0-x\r\n" + packet(b"\x14" + bytes(16) + struct.pack(">I", 2) + b"\xff\xfe"),  # its algorithms
    ],
)
def test_what_is_no_ssh_is_a_connection_lost(laptop, said):  # noqa: F811
    """paramiko raises UnicodeDecodeError, ValueError and others over it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            client, _ = server.accept()
            with client:
                client.sendall(said)
                client.recv(1 << 16)

        threading.Thread(target=speak, daemon=True).start()
        laptop.server.write_config(port=server.getsockname()[1])
        with pytest.raises(Unreachable, match="connection lost"):
            Remote(resolve("gpuhost", laptop.workspace)).open()


NOISE = "bash: /etc/profile.d/site.sh: Permission denied. Host key verification failed."
"""What a login shell there may print, of its own ssh too."""


def test_a_login_shells_words_are_no_refusal(laptop):  # noqa: F811
    host = resolve("gpuhost", laptop.workspace)
    assert isinstance(explain_ssh(host, NOISE, 255, logged_in=True), Unreachable)
    assert isinstance(explain_ssh(host, "bash: site.sh: Permission denied", 255), Unreachable)
    assert isinstance(explain_ssh(host, "me@there: Permission denied (publickey).", 255), AuthenticationFailed)


def test_a_stream_that_is_cut_behind_such_words_is_unreachable(laptop):  # noqa: F811
    python = laptop.root / "python"
    python.write_text(f"#!/bin/sh\necho '{NOISE}' >&2; exec {sys.executable} \"$@\"\n")
    python.chmod(0o755)
    laptop.host(python=str(python))
    agent, heard, ended = AgentProcess(resolve("gpuhost", laptop.workspace), None), [], []
    agent.begin({"op": "ready", "more": True}, heard.append, ended.append)
    until(lambda: len(heard) == 2)
    laptop.server.kill_sessions()
    agent.join()
    assert isinstance(ended[0], Unreachable), ended


@pytest.mark.parametrize("status", [129, 137, 143])
@pytest.mark.parametrize("before", [b"", Replies.MARK])
def test_an_agent_that_a_signal_ended_is_worth_a_retry(laptop, status, before):  # noqa: F811
    """A host that restarts ends it, and a login shell that waits for it says "Terminated"."""
    chunks = [(before, b"Terminated\n", None), (b"", b"", status)]
    with pytest.raises(Unreachable, match=f"ended by signal {status - 128}"):
        list(Replies(resolve("gpuhost", laptop.workspace), iter(chunks)))


@pytest.mark.parametrize(("seconds", "pauses"), [(0, []), (10, [1, 2, 4, 3]), (40, [1, 2, 4, 8, 15, 10])])
def test_a_host_that_stays_away_is_given_up(monkeypatch, seconds, pauses):
    now, slept = [0.0], []

    def sleep(pause):
        slept.append(pause)
        now[0] += pause

    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: now[0]))
    told: list[str] = []
    waiting = Patience(seconds, told.append)
    waiting._ended = SimpleNamespace(wait=sleep)
    for _ in pauses:
        waiting.wait(Unreachable("away"))
    with pytest.raises(Unreachable):
        waiting.wait(Unreachable("away"))
    assert slept == pauses and told == ["away; trying again"] * len(pauses)
    waiting.answered()
    assert seconds == 0 or waiting.next_pause_s(Unreachable("away")) == 1  # the next loss is a new one
    with pytest.raises(SlowLogin):
        waiting.wait(SlowLogin("the host answers, its shell does not"))


def test_every_command_waits_for_a_host_that_is_away_for_a_moment(
    laptop,  # noqa: F811
    relay,
    monkeypatch,
    capsys,
):
    """Each has --patience_s; the first connection is cut, and the command says so and goes on."""
    monkeypatch.chdir(laptop.workspace)
    monkeypatch.setattr("remote.cli.commands.same_version", lambda remote: None)
    stub_train(laptop)
    launch = ["launch", *TRAIN, "--max_steps", "1", "--wait"]
    for command, *rest in (["runs"], ["gpus"], launch, ["follow"], ["stop"], ["fetch"]):
        relay.break_next("cut", 0)
        assert main([command, "gpuhost", *rest, "--patience-s", "60"]) == 0
        said = capsys.readouterr().err
        assert "connection lost" in said and "trying again" in said, said
    assert len(list((laptop.there / "runs").iterdir())) == 1
    laptop.server.write_config(port=free_port())
    assert main(["runs", "gpuhost", "--patience_s", "0"]) == 1
    said = capsys.readouterr().err
    assert "connection refused" in said and "trying again" not in said


def test_too_many_keys_are_a_refusal(laptop):  # noqa: F811
    """The host ends the connection, and says why."""
    (laptop.server.root / "authorized_keys").write_text("")
    laptop.server.stop()
    laptop.server.extra = "MaxAuthTries 1"
    laptop.server.start()
    with pytest.raises(AuthenticationFailed, match="refused our keys"):
        laptop.connect()
    host = resolve("gpuhost", laptop.workspace)
    assert isinstance(
        explain_ssh(host, "Received disconnect: Too many authentication failures", 255), AuthenticationFailed
    )


@pytest.mark.parametrize("code", [socket.EAI_AGAIN, socket.EAI_NONAME])
def test_follow_goes_on_when_there_is_no_dns_for_a_moment(laptop, monkeypatch, code):  # noqa: F811
    monkeypatch.setattr(patience, "BACKOFF_S", (0,))

    def no_dns(*_, **__):
        raise socket.gaierror(code, "no name service")

    remote = Remote(resolve("gpuhost", laptop.workspace))
    with monkeypatch.context() as away:
        away.setattr(socket, "getaddrinfo", no_dns)
        with pytest.raises(Unreachable, match="is there a network"):
            remote.open()
        events = iter(run_events.RunEvents(remote, "last"))
        assert [next(events)["state"] for _ in range(3)] == ["unreachable"] * 3


def test_a_name_that_nobody_has_heard_of_is_a_mistake(laptop):  # noqa: F811
    """DNS answers that there is none, and no key is known for it: nothing is worth waiting for."""
    laptop.server.known_hosts.unlink()
    laptop.server.config.write_text(laptop.server.config.read_text().replace("127.0.0.1", "no.such.host.invalid"))
    assert "unknown host" in laptop.command("runs", "gpuhost", check=2).stderr
