"""A provider on this computer, for tests and the demo: each machine is an sshd on 127.0.0.1 with a home of its own.

Nothing of it is isolated from the user: it only behaves as a rented machine does, up to losing its disk at its end.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from remote.cloud.provider import CloudError, Machine, Offer
from surgvqa.errors import UsageError
from surgvqa.files import fsync_folder, read_json, user_folder, write_json_atomic
from surgvqa.runs.process import descendants, end_all
from surgvqa.untrusted import of_kinds

BOOT_S = 30.0
"""Seconds in which sshd has to come up."""
KINDS = {"name": "text", "port": "a whole number", "asked": "a time", "ends": "a time"}
LABEL = re.compile("[a-z0-9][a-z0-9-]{0,63}")


class LocalMachines:
    """A `Provider`. A machine's id is its name; its folder is written before its sshd starts, so none runs unlisted."""

    name = "local"
    settles_s = 0.0  # its folder is there before anything else

    def __init__(self, folder: Path | None = None):
        self.folder = folder or user_folder("state") / "local"
        self.user = getpass.getuser()

    def offers(self) -> list[Offer]:
        why = "" if _sshd() else "needs sshd (openssh-server)"
        return [Offer("local", why or "this computer", 0, None, 0.0, () if why else ("here",))]

    def machines(self) -> list[Machine]:
        found = [self.machine(file.parent.name) for file in sorted(self.folder.glob("*/machine.json"))]
        return [machine for machine in found if machine and machine.state != "terminated"]

    def machine(self, machine_id: str) -> Machine | None:
        file = self._place(machine_id) / "machine.json"
        if not file.exists():
            return None
        noted, wrong = of_kinds(read_json(file), KINDS)
        if wrong or not {"name", "port", "asked"} <= noted.keys():
            raise CloudError(f"local: {file}: damaged; end its sshd by hand and remove the folder")
        alive = self._processes(machine_id)
        if "ends" in noted:
            state = "terminating" if alive else "terminated"
        elif self._listens(machine_id):
            state = "active"
        else:
            state = "booting" if 0 <= time.time() - noted["asked"] < BOOT_S else "unhealthy"
        address = "127.0.0.1" if state == "active" else ""
        key = (file.parent / "host_key.pub").read_text() if state == "active" else ""
        return Machine(machine_id, machine_id, state, address, "local", "here", 0.0, noted["port"], key)

    def add_key(self, name: str, public_key: str) -> str:
        keys = self.folder / "keys"
        keys.mkdir(parents=True, exist_ok=True, mode=0o700)
        (keys / f"{name}.pub").write_text(public_key)
        return name

    def launch(self, offer: str, region: str, name: str, key: str) -> str:
        sshd, place = _sshd(), self._place(name)
        if offer != "local" or region != "here" or sshd is None:
            raise CloudError("local: needs sshd (openssh-server)" if sshd is None else f"local: no such offer: {offer}")
        public_key = (self.folder / "keys" / f"{key}.pub").read_text()
        try:
            (place / "home").mkdir(parents=True, mode=0o700)
        except FileExistsError:
            raise CloudError(f"local: {name} is there already") from None
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        write_json_atomic(place / "machine.json", {"name": name, "port": port, "asked": time.time()})
        fsync_folder(place)
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / "host_key")]
        subprocess.run(keygen, check=True, stdin=subprocess.DEVNULL)
        (place / "authorized_keys").write_text(public_key)
        (place / "authorized_keys").chmod(0o600)
        (place / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{port}\nHostKey {place / 'host_key'}\nPidFile {place / 'sshd.pid'}\n"
            f"AuthorizedKeysFile {place / 'authorized_keys'}\nUsePAM no\nStrictModes no\nPermitRootLogin yes\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nMaxStartups 100\n"
            f"SetEnv HOME={place / 'home'}\nSubsystem sftp internal-sftp\n"
        )
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        subprocess.run(  # it goes into the background by itself: whoever ends us does not end it
            [sshd, "-E", str(place / "sshd.log"), "-f", str(place / "sshd_config")],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={"PATH": os.environ.get("PATH", os.defpath)},  # none of our secrets
        )
        until = time.monotonic() + BOOT_S
        while not self._listens(name) and time.monotonic() < until:
            time.sleep(0.02)
        return name

    def terminate(self, machine_id: str) -> None:
        place = self._place(machine_id)
        if not (place / "machine.json").exists():
            raise CloudError(f"local: no machine {machine_id}")
        write_json_atomic(place / "machine.json", {**read_json(place / "machine.json"), "ends": time.time()})
        end_all(self._processes(machine_id), 2.0)
        for entry in place.iterdir():  # the disk goes with it; only that it was there is kept; two may ask at once
            if entry.name != "machine.json":
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)

    def _place(self, name: str) -> Path:
        if not LABEL.fullmatch(name):
            raise CloudError(f"local: {name!r} is no name of a machine")
        return self.folder / name

    def _listens(self, name: str) -> bool:
        try:
            pid = int((self._place(name) / "sshd.pid").read_text())
        except (OSError, ValueError):
            return False
        return pid in self._processes(name)

    def _processes(self, name: str) -> list[int]:
        """Its sshd with all below, and whatever has its home for HOME: jobs that outlive their connection."""
        place = self._place(name)
        config, home = str(place / "sshd_config").encode(), f"HOME={place / 'home'}".encode()
        if sys.platform != "linux":
            raise UsageError("rent local: needs Linux")
        found: set[int] = set()
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            try:
                line = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ") + b" "
                environ = Path("/proc", entry, "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"sshd" in line.partition(b" ")[0] and b" -f " + config + b" " in line:  # sshd rewrites its title
                found |= {int(entry), *descendants(int(entry))}
            elif home in environ:
                found.add(int(entry))
        return sorted(found)


def _sshd() -> str | None:
    return shutil.which("sshd", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin")
