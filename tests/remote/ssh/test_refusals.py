"""Only an answer of the host is a refusal; a network that is away or cut is worth a retry."""

from __future__ import annotations

import inspect
import socket

import paramiko
import pytest
from sshd import Relay, laptop  # noqa: F401

from remote.jobs import follower
from remote.ssh.connection import Remote
from remote.ssh.errors import AuthenticationFailed, Unreachable, explain_ssh
from remote.ssh.hosts import resolve
from remote.ssh.transport import Transport
from surgvqa.errors import UsageError

pytestmark = pytest.mark.slow


def test_a_cut_during_authentication_is_no_refusal(laptop, monkeypatch):  # noqa: F811
    relay = Relay(laptop.server.port)
    laptop.server.write_config(port=relay.port)
    ask = paramiko.auth_handler.AuthHandler.auth_publickey

    def cut(self, *rest):
        relay.cut()
        return ask(self, *rest)

    monkeypatch.setattr(paramiko.auth_handler.AuthHandler, "auth_publickey", cut)
    with pytest.raises(Unreachable):
        laptop.connect()
    relay.close()


def test_a_stall_during_authentication_is_no_refusal(laptop, monkeypatch):  # noqa: F811
    relay = Relay(laptop.server.port)
    laptop.server.write_config(port=relay.port)
    ask = paramiko.auth_handler.AuthHandler.auth_publickey

    def stall(self, *rest):
        relay.freeze()
        self.transport.auth_timeout = 0.5
        return ask(self, *rest)

    monkeypatch.setattr(paramiko.auth_handler.AuthHandler, "auth_publickey", stall)
    with pytest.raises(Unreachable, match="while logging in"):
        laptop.connect()
    relay.close()


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
    monkeypatch.setattr(follower, "BACKOFF_S", (0,))

    def no_dns(*_, **__):
        raise socket.gaierror(code, "no name service")

    remote = Remote(resolve("gpuhost", laptop.workspace))
    with monkeypatch.context() as away:
        away.setattr(socket, "getaddrinfo", no_dns)
        with pytest.raises(UsageError if code == socket.EAI_NONAME else Unreachable):
            remote.open()
        events = iter(follower.Follower(remote, "last"))
        assert [next(events)["state"] for _ in range(3)] == ["unreachable"] * 3


def test_paramikos_private_names_are_there():
    assert str(inspect.signature(paramiko.agent.AgentSSH._connect)) == "(self, conn)"
    assert str(inspect.signature(paramiko.Transport._parse_disconnect)) == "(self, m)"
    assert inspect.signature(Transport._parse_disconnect).parameters.keys() == {"self", "m"}
