"""Keys as ssh has them: held by an agent, named by their public half, in PKCS8."""

from __future__ import annotations

import subprocess

import pytest
from sshd import laptop  # noqa: F401
from waiting import until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("named", ["user_key", "user_key.pub"])
def test_an_encrypted_key_that_the_agent_holds(laptop, named):  # noqa: F811
    """With IdentitiesOnly, behind IdentityAgent PATH."""
    key, sock = laptop.server.root / "user_key", laptop.root / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", sock], stdout=subprocess.DEVNULL)
    try:
        until(sock.exists)
        subprocess.run(["ssh-add", "-q", key], env={"SSH_AUTH_SOCK": str(sock), "PATH": "/usr/bin"}, check=True)
        subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", key], check=True)
        text = laptop.server.config.read_text().replace("IdentityAgent none", f"IdentityAgent {sock}")
        laptop.server.config.write_text(text.replace(f"IdentityFile {key}", f"IdentityFile {key.with_name(named)}"))
        laptop.connect().close()
    finally:
        agent.kill()
        agent.wait()


def test_a_pkcs8_key(laptop):  # noqa: F811
    key = laptop.server.root / "user_key"
    key.unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-m", "PKCS8", "-N", "", "-f", key], check=True)
    assert "BEGIN PRIVATE KEY" in key.read_text()
    (laptop.server.root / "authorized_keys").write_text(key.with_name("user_key.pub").read_text())
    laptop.connect().close()
