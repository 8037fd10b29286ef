"""A real sshd on 127.0.0.1 with keys, known_hosts, ssh_config and a home of its own; nothing of the user is touched."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
import contextlib


def why_not() -> str | None:
    """Why there can be no sshd here; None when there can."""
    if sys.platform != "linux":
        return "needs Linux"
    for program in ("ssh", "ssh-keygen", "ssh-keyscan"):
        if not shutil.which(program):
            return f"{program} is not installed (apt-get install openssh-client)"
    if not sshd_path():
        return "sshd is not installed (apt-get install openssh-server)"
    return None


def sshd_path() -> str | None:
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Sshd:
    """`start`, `stop` (listener and sessions), `restart`; `name` is the host in `config`."""

    def __init__(self, root: Path, name: str = "gpuhost", address: str = "127.0.0.1", extra: str = ""):
        self.root, self.name, self.address, self.extra = root, name, address, extra
        self.home = root / "home"
        self.home.mkdir(parents=True)
        self.port = free_port()
        self.config = root / "ssh_config"
        self.known_hosts = root / "known_hosts"
        self.process: subprocess.Popen[bytes] | None = None
        self.new_host_key()
        self._keygen(root / "user_key")
        (root / "authorized_keys").write_text((root / "user_key.pub").read_text())
        (root / "authorized_keys").chmod(0o600)
        self.write_config()

    @staticmethod
    def _keygen(file: Path) -> None:
        for old in (file, file.with_name(file.name + ".pub")):
            old.unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)

    def new_host_key(self) -> None:
        self._keygen(self.root / "host_key")

    def write_config(self, port: int | None = None, more: str = "") -> None:
        """The ssh_config that knows this host; `port` of a relay in between."""
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        self.config.write_text(
            f"Host {self.name}\n HostName {self.address}\n Port {port or self.port}\n User {user}\n HostKeyAlias {self.name}\n"
            f" IdentityFile {self.root / 'user_key'}\n IdentitiesOnly yes\n IdentityAgent none\n"
            f" UserKnownHostsFile {self.known_hosts}\n GlobalKnownHostsFile /dev/null\n HashKnownHosts yes\n {more}\n"
        )

    def trust(self) -> None:
        """Puts the host's key into known_hosts."""
        self.known_hosts.write_text(f"{self.name} {(self.root / 'host_key.pub').read_text()}")

    def start(self) -> Sshd:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        file = self.root / "sshd_config"
        file.write_text(
            f"ListenAddress {self.address}:{self.port}\nHostKey {self.root / 'host_key'}\n"
            f"AuthorizedKeysFile {self.root / 'authorized_keys'}\nPidFile none\nUsePAM no\nStrictModes no\n"
            "PermitRootLogin yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"SetEnv HOME={self.home}\nMaxStartups 100\n{self.extra}\n"
        )
        self.log = open(self.root / "sshd.log", "ab")
        self.process = subprocess.Popen(
            [sshd_path(), "-D", "-e", "-f", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex((self.address, self.port)) == 0:
                    return self
            if self.process.poll() is not None:
                raise RuntimeError((self.root / "sshd.log").read_text())
            time.sleep(0.02)
        raise RuntimeError("sshd did not start")

    def sessions(self) -> list[int]:
        """Pids of the session processes below our listener."""
        from surgvqa.supervisor import descendants, process_stat

        if not self.process:
            return []
        below = descendants(self.process.pid)
        return [p for p in below if (process_stat(p) or ["Z"])[0] != "Z" and b"sshd" in _cmdline(p)]

    def kill_sessions(self) -> None:
        """As if sshd had crashed: every connection is cut, the listener stays."""
        for pid in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        self.kill_sessions()
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None
            self.log.close()


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
