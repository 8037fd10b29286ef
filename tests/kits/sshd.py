"""A real sshd on 127.0.0.1 with keys, known_hosts, ssh_config and a home of its own; nothing of the user is touched."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from places import ROOT

from remote.jobs import launch


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
        self.limits = "MaxStartups 100"
        self.environment = ""  # further NAME=value of the sessions
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
            f"Host {self.name}\n HostName {self.address}\n Port {port or self.port}\n User {user}\n"
            f" HostKeyAlias {self.name}\n"
            f" IdentityFile {self.root / 'user_key'}\n IdentitiesOnly yes\n IdentityAgent none\n"
            f" UserKnownHostsFile {self.known_hosts}\n GlobalKnownHostsFile /dev/null\n HashKnownHosts yes\n {more}\n"
        )

    def trust(self) -> None:
        """Puts the host's key into known_hosts."""
        self.known_hosts.write_text(f"{self.name} {(self.root / 'host_key.pub').read_text()}")

    def start(self, within: tuple[str, ...] | list[str] = ()) -> Sshd:
        """`within`: words before the command, e.g. to start it in another network namespace."""
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        file = self.root / "sshd_config"
        file.write_text(
            f"ListenAddress {self.address}:{self.port}\nHostKey {self.root / 'host_key'}\n"
            f"AuthorizedKeysFile {self.root / 'authorized_keys'}\nPidFile none\nUsePAM no\nStrictModes no\n"
            "PermitRootLogin yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"SetEnv HOME={self.home} TMPDIR={self.root} {self.environment}\n"
            f"{self.limits}\nSubsystem sftp internal-sftp\n{self.extra}\n"
        )
        self.log = open(self.root / "sshd.log", "ab")  # noqa: SIM115
        seen = self.log.tell()
        self.process = subprocess.Popen(
            [*within, sshd_path(), "-D", "-e", "-f", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        for _ in range(500):
            with open(self.root / "sshd.log", "rb") as log:
                log.seek(seen)
                if b"Server listening" in log.read():
                    return self
            if self.process.poll() is not None:
                raise RuntimeError((self.root / "sshd.log").read_text())
            time.sleep(0.02)
        raise RuntimeError("sshd did not start")

    def sessions(self) -> list[int]:
        """Pids of the session processes below our listener."""
        from surgvqa.runs.process import descendants

        below = descendants(self.process.pid) if self.process else []
        titles = {pid: cmdline(pid) for pid in below}
        return [pid for pid, title in titles.items() if title.startswith(b"sshd: ") and b"[listener]" not in title]

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


def one_line(error: Exception) -> str:
    assert "\n" not in str(error)
    return str(error)


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Relay:
    """A TCP relay in front of sshd: `freeze` swallows everything silently (a dead link), `cut` resets connections."""

    def __init__(self, target_port: int, bytes_per_s: float | None = None):
        self.target_port, self.bytes_per_s = target_port, bytes_per_s
        self.frozen = threading.Event()
        self.passed = 0
        """Bytes from the client to the host."""
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.broken = 0
        """Connections that `break_next` broke."""
        self._fault: tuple[str, int] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def break_next(self, how: str, at: int) -> None:
        """The next connection is "cut" or "stalled" once the client has sent `at` bytes of it."""
        self._fault = how, at

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.frozen.is_set():
                self._pairs.append((client, client))
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target_port))
            except OSError:
                client.close()
                continue
            self._pairs.append((client, server))
            stalled = threading.Event()
            fault, self._fault = self._fault, None
            if fault and fault[1] == 0:
                self._break((client, server), stalled, fault[0])
            threading.Thread(target=self._pump, args=(client, server, stalled, fault), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, stalled), daemon=True).start()

    def _break(self, pair: tuple[socket.socket, socket.socket], stalled: threading.Event, how: str) -> None:
        self.broken += 1
        if how == "cut":
            self._reset(pair)
        stalled.set()

    def _pump(
        self,
        source: socket.socket,
        target: socket.socket,
        stalled: threading.Event,
        fault: tuple[str, int] | None = ("", -1),
    ) -> None:
        from_client, sent = fault != ("", -1), 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                while self.frozen.is_set():
                    time.sleep(0.02)
                if from_client:
                    sent += len(data)
                    self.passed += len(data)
                    if self.bytes_per_s:
                        time.sleep(len(data) / self.bytes_per_s)
                    if fault and sent >= fault[1] and not stalled.is_set():
                        self._break((source, target), stalled, fault[0])
                if not stalled.is_set():
                    target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _reset(pair: tuple[socket.socket, socket.socket]) -> None:
        for one in pair:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.shutdown(socket.SHUT_RDWR)
                one.close()

    def freeze(self) -> None:
        self.frozen.set()

    def thaw(self) -> None:
        self.frozen.clear()

    def cut(self) -> None:
        """Every connection is reset, as by a router that restarted."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            self._reset(pair)

    def close(self) -> None:
        self._listener.close()
        self.thaw()
        self.cut()


@dataclass
class Laptop:
    """A workspace here and a host behind sshd: what every remote test starts from."""

    root: Path
    server: Sshd
    workspace: Path

    @property
    def there(self) -> Path:
        """The workspace on the host."""
        return self.server.home / "surgvqa"

    def host(self, **settings: object) -> None:
        """Writes hosts.toml."""
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        (self.workspace / "hosts.toml").write_text("\n".join([f"[{self.server.name}]", *lines]) + "\n")

    def connect(self):
        from remote.ssh.connection import connect

        return connect(self.server.name, self.workspace)

    def command(self, *words: str, check: int | None = 0, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """`surgvqa-remote WORDS` as a process of its own."""
        done = subprocess.run(
            [sys.executable, "-m", "remote", *words],
            cwd=self.workspace,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert check is None or done.returncode == check, done.stdout + done.stderr
        return done

    def here(self, *words: str, check: int = 0) -> dict:
        """As `json`, in this process, which spares the start of another."""
        from remote.cli.main import main

        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(self.workspace), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*words, "--json"])
        assert code == check, err.getvalue()
        return json.loads(out.getvalue())

    def json(self, *words: str, check: int | None = 0) -> dict:
        return json.loads(self.command(*words, "--json", check=check).stdout)


@pytest.fixture
def laptop(tmp_path, monkeypatch):
    """A `Laptop` with a trusted, running host; everything of it ends with the test."""
    reason = why_not()
    if reason:
        pytest.skip(f"no sshd: {reason}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "laptop_home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "laptop_home").mkdir()
    server = Sshd(tmp_path / "host").start()
    server.trust()
    monkeypatch.setenv("SURGVQA_SSH_CONFIG", str(server.config))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    workspace = tmp_path / "ws"
    workspace.mkdir()
    one = Laptop(tmp_path, server, workspace)
    one.host(venv=sys.prefix, python=sys.executable)
    yield one
    server.stop()
    end_processes_below(tmp_path)


def processes_naming(path: Path) -> list[int]:
    """Those, but ourselves, whose command line holds `path`."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]
    return [pid for pid in pids if str(path).encode() in cmdline(pid)]


def end_processes_below(folder: Path) -> None:
    """Ends the processes that a test left behind: those whose command line or folder names its temporary folder."""
    from surgvqa.runs.process import end_all

    named = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                if str(folder).encode() in cmdline(int(entry)) or os.readlink(f"/proc/{entry}/cwd").startswith(
                    str(folder)
                ):
                    named.append(int(entry))
    end_all(named, 0.0)


STUB_TRAIN = '''
"""Stands in for surgvqa.evaluation.train on the host: launching without a model, all else is real."""
import os, subprocess, sys, time, types
from pathlib import Path

def run(options, run):
    from surgvqa.outcome import Outcome
    how = options.run_name or ""
    (run.folder / "env.txt").write_text(repr(dict(os.environ)))
    (run.folder / "argv.txt").write_text(repr(sys.argv))
    if "children" in how:  # like torchrun's workers: sessions of their own
        for _ in range(3):
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300) #" + str(run.folder)],
                             start_new_session=True)
    if "deaf" in how:
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "killed" in how:
        os.kill(os.getpid(), 9)
    if "fails" in how:
        raise RuntimeError("no such luck")
    if "saves" in how:
        (run.folder / "checkpoint-1").mkdir()
        (run.folder / "checkpoint-1" / "adapter_model.safetensors").write_bytes(b"saved")
        run.emit("checkpoint", step=1, path="checkpoint-1")
    steps = options.max_steps if options.max_steps > 0 else 100000
    print("training starts", flush=True)
    for step in range(1, steps + 1):
        run.emit("metric", step=step, total_steps=steps, loss=1.0 / step)
        time.sleep(0.05)
    (run.folder / "adapter").mkdir()
    (run.folder / "adapter" / "adapter_model.safetensors").write_bytes(os.urandom(3_000_000))
    (run.folder / "adapter" / "optimizer.pt").write_bytes(b"x" * 1000)
    return Outcome({"steps": steps, "train_loss": 1.0 / steps})

module = types.ModuleType("surgvqa.evaluation.train")
module.run = run
sys.modules["surgvqa.evaluation.train"] = module
'''


def stub_train(laptop: Laptop) -> None:
    """Gives the host a venv whose `surgvqa train` is the stub."""
    site = laptop.root / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(STUB_TRAIN)
    python = laptop.root / "host" / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site}:{ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    laptop.host(venv=str(python.parent.parent), python=sys.executable)
    for folder in ("merged", "frames", "audio"):
        (laptop.there / folder).mkdir(parents=True)
    (laptop.there / "train.jsonl").write_text("")


def venv_there(laptop: Laptop, without: tuple[str, ...] = ()) -> Path:
    """A venv in the host's workspace that sees this interpreter's packages, so that setup downloads nothing; returns
    its site-packages. `without`: the packages whose names begin so are not seen."""
    laptop.host(python=sys.executable)
    packages = laptop.root / "packages"
    packages.mkdir()
    for entry in Path(next(p for p in sys.path if p.endswith("site-packages"))).iterdir():
        if not entry.name.startswith((*without, "surgvqa", "_surgvqa")):  # ours is what setup installs
            (packages / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", laptop.there / "venv"], check=True)
    site = next((laptop.there / "venv" / "lib").glob("python3*/site-packages"))
    (site / "zz.pth").write_text(f"import sys; sys.path.append({str(packages)!r})\n")
    return site


TRAIN = ("train", "--model_name_or_path", "merged", "--train_data_path", "train.jsonl", "--frames_dir", "frames",
         "--audio_dir", "audio")  # fmt: skip


def start(remote, *more, **options):
    command, *argv = [*TRAIN, *more]
    return launch.launch(remote, command, argv, needs=[], **options)["run"]
