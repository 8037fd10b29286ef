"""Keys as ssh has them: held by an agent, named by their public half, certified, in any format; and those that fail."""

from __future__ import annotations

import contextlib
import inspect
import subprocess

import paramiko
import pytest
from sshd import laptop  # noqa: F401
from waiting import until

from remote.ssh import keys
from remote.ssh.errors import AuthenticationFailed
from remote.ssh.paramiko_internals import Transport, host_key_kinds

BITS = {"rsa": ("-b", "1024"), "ecdsa": (), "ed25519": ()}
"""Small enough to be made at once; sshd's RequiredRSASize is 1024."""


def keygen(*words):
    subprocess.run(["ssh-keygen", "-q", *map(str, words)], check=True)


@contextlib.contextmanager
def agent_with(key, sock):
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", sock], stdout=subprocess.DEVNULL)
    try:
        until(sock.exists)
        subprocess.run(["ssh-add", "-q", key], env={"SSH_AUTH_SOCK": str(sock), "PATH": "/usr/bin"}, check=True)
        yield
    finally:
        agent.kill()
        agent.wait()


def logs_in(laptop):  # noqa: F811
    """Both ways to the host: ours, and OpenSSH's, which knows best."""
    laptop.connect().close()
    words = ["ssh", "-F", laptop.server.config, "-o", "BatchMode=yes", "gpuhost", "true"]
    assert subprocess.run(words).returncode == 0


@pytest.mark.slow
def test_a_key_in_the_agent_whose_comment_is_latin_1(laptop):  # noqa: F811
    key, sock = laptop.server.root / "user_key", laptop.root / "agent"
    words = ["ssh-keygen", "-q", "-c", "-f", key, "-C", b"Jos\xe9"]
    subprocess.run(words, check=True)
    with agent_with(key, sock):
        laptop.server.config.write_text(
            laptop.server.config.read_text()
            .replace("IdentityAgent none", f"IdentityAgent {sock}")
            .replace("IdentitiesOnly yes", "IdentitiesOnly no")
        )
        key.unlink()
        logs_in(laptop)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("named", "through"),
    [
        ("user_key", "IdentityAgent PATH"),
        ("user_key.pub", "IdentityAgent $NAME"),
        ("user_key without .pub", "SSH_AUTH_SOCK"),
    ],
)
def test_an_encrypted_key_that_the_agent_holds(laptop, monkeypatch, named, through):  # noqa: F811
    """With IdentitiesOnly."""
    key, sock = laptop.server.root / "user_key", laptop.root / "agent"
    monkeypatch.setenv("NAME", str(sock))
    if through == "SSH_AUTH_SOCK":
        monkeypatch.setenv(through, str(sock))
    with agent_with(key, sock):
        keygen("-p", "-P", "", "-N", "secret", "-f", key)
        if named.endswith("without .pub"):
            key.with_name("user_key.pub").unlink()
        agent = {"IdentityAgent PATH": f"IdentityAgent {sock}", "IdentityAgent $NAME": "IdentityAgent $NAME"}
        text = laptop.server.config.read_text().replace("IdentityAgent none", agent.get(through, ""))
        named = named.partition(" ")[0]
        laptop.server.config.write_text(text.replace(f"IdentityFile {key}", f"IdentityFile {key.with_name(named)}"))
        logs_in(laptop)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [("ecdsa", "PKCS8"), ("rsa", "PEM")])
def test_a_key_of_an_older_format(laptop, kind, form):  # noqa: F811
    key = laptop.server.root / "user_key"
    key.unlink()
    keygen("-t", kind, *BITS[kind], "-m", form, "-N", "", "-f", key)
    assert ("BEGIN PRIVATE KEY" in key.read_text()) == (form == "PKCS8")
    (laptop.server.root / "authorized_keys").write_text(key.with_name("user_key.pub").read_text())
    logs_in(laptop)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "held"), [("ed25519", False), ("ecdsa", True), ("rsa", True)])
def test_a_certificate(laptop, kind, held):  # noqa: F811
    """CertificateFile names it; the host knows the authority alone. The key is in its file, or in the agent."""
    key, ca, user = laptop.server.root / "user_key", laptop.root / "ca", laptop.connect().host.user
    key.unlink()
    keygen("-t", kind, *BITS[kind], "-N", "", "-f", key)
    keygen("-t", "ed25519", "-N", "", "-f", ca)
    keygen("-s", ca, "-I", "laptop", "-n", user, key.with_name("user_key.pub"))
    certificate = key.with_name("user_key-cert.pub").rename(laptop.root / "certificate.pub")
    (laptop.server.root / "authorized_keys").write_text("")
    laptop.server.stop()
    laptop.server.extra = f"TrustedUserCAKeys {ca}.pub"
    laptop.server.start()
    with pytest.raises(AuthenticationFailed):
        laptop.connect()
    laptop.server.write_config(more=f"CertificateFile {certificate}")
    if not held:
        logs_in(laptop)
        return
    sock = laptop.root / "agent"
    with agent_with(key, sock):
        laptop.server.config.write_text(
            laptop.server.config.read_text().replace("IdentityAgent none", f"IdentityAgent {sock}")
        )
        keygen("-p", "-P", "", "-N", "secret", "-f", key)
        logs_in(laptop)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: keygen("-t", "ed25519", "-N", "x", "-f", f), "is encrypted; load it first: ssh-add"),
        (
            lambda f: keygen("-t", "rsa", *BITS["rsa"], "-m", "PEM", "-N", "secret", "-f", f),
            "is encrypted; load it first: ssh-add",
        ),
        (
            lambda f: keygen("-t", "rsa", *BITS["rsa"], "-m", "PKCS8", "-N", "secret", "-f", f),
            "is encrypted; load it first",
        ),
        (lambda f: f.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nbm90IGEga2V5\n-----END"), "or a damaged one"),
        (lambda f: f.write_bytes(bytes(range(256)) * 9), "or a damaged one"),
        (lambda f: f.write_bytes(b"-----BEGIN PRIVATE KEY-----\n\xff\n-----END PRIVATE KEY-----"), "or a damaged one"),
        (lambda f: f.write_text(""), "or a damaged one"),
        (lambda f: f.write_bytes(bytes(2 << 20)), "larger than 1 MiB"),
        (lambda f: f.mkdir(), "Is a directory"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_one_line(tmp_path, make, said):
    file = tmp_path / "key"
    make(file)
    with pytest.raises(keys.UnusableKey) as caught:
        keys.load(str(file))
    assert said in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)
    keys.public_blob(str(file))  # whatever it is


def test_a_damaged_key_of_any_kind_is_one_line(tmp_path):
    keygen("-t", "ed25519", "-N", "", "-f", tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for place in range(40, len(whole) - 40, 7):
        (tmp_path / "key").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with contextlib.suppress(keys.UnusableKey):
            keys.load(str(tmp_path / "key"))
        (tmp_path / "key").write_bytes(whole[:place])
        with pytest.raises(keys.UnusableKey):
            keys.load(str(tmp_path / "key"))
        keys.public_blob(str(tmp_path / "key"))


@pytest.mark.slow
def test_keys_that_cannot_be_used_are_named_when_no_other_fits(laptop):  # noqa: F811
    """An encrypted key and one that is none are passed over; the third is refused, and the line names all of them."""
    root = laptop.server.root
    keygen("-t", "ed25519", "-N", "secret", "-f", root / "encrypted")
    (root / "broken").write_text("no key")
    own = f"IdentityFile {root / 'user_key'}"
    more = f"IdentityFile {root / 'encrypted'}\n IdentityFile {root / 'broken'}\n {own}"
    laptop.server.config.write_text(laptop.server.config.read_text().replace(own, more))
    logs_in(laptop)
    (root / "authorized_keys").write_text("")
    with pytest.raises(AuthenticationFailed, match=r"refused our keys.*ssh-add.*broken: no private key"):
        laptop.connect()


@pytest.mark.parametrize(
    ("thing", "signature"),
    [
        (paramiko.agent.AgentSSH._connect, "(self, conn)"),
        (paramiko.agent.AgentSSH._send_message, "(self, msg)"),
        (paramiko.Transport._parse_disconnect, "(self, m)"),
    ],
)
def test_paramikos_private_names_are_there(thing, signature):
    assert str(inspect.signature(thing)) == signature


def test_our_overrides_of_paramiko_fit():
    assert inspect.signature(Transport._parse_disconnect).parameters.keys() == {"self", "m"}
    assert "ssh-ed25519" in host_key_kinds() and all(isinstance(kind, str) for kind in host_key_kinds())
