"""The ledger: one file for each machine that we meant to rent, written before the provider is asked.

It lies in the user's state folder, not in a workspace: a machine costs money whatever becomes of the workspace.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from remote.cloud.documents import read_as
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.files import fsync_folder, user_folder, write_json_atomic
from surgvqa.untrusted import one_line

NAME = re.compile("[a-z][a-z0-9-]{0,39}")
KINDS = {"name": "text", "provider": "text", "label": "text", "type": "text", "region": "text", "state": "text",
         "machine_id": "text", "price_per_hour": "a number", "asked": "a time", "end_asked": "a time",
         "ended": "a time", "ending": "true or false"}  # fmt: skip
STATES = ("asked", "rented", "ended", "refused", "lost")


@dataclass
class Record:
    """One intention to rent, and its outcome."""

    name: str
    """Ours, and the host's in hosts.toml."""
    provider: str
    label: str
    """The machine's name at the provider: ours and a random part, by which a lost launch is found again."""
    type: str
    region: str
    price_per_hour: float
    asked: float
    """When it was written, before the launch; Unix seconds by our clock."""
    state: str = "asked"
    """asked (a launch may be on its way), rented, ended, refused (the provider said no), or lost (the launch got no
    answer, and long after no machine of its label was there)."""
    machine_id: str = ""
    end_asked: float | None = None
    """When it was first asked to terminate the machine, which it knew then."""
    ended: float | None = None
    ending: bool = False
    """Whether the provider was seen ending it: only then is a machine that it lists no more one that has ended."""

    @property
    def open(self) -> bool:
        """Whether the machine may cost money."""
        return self.state in ("asked", "rented")

    def cost(self, now: float) -> float:
        """US dollars from the launch until its end, or `now`: a guess by our clock; the provider's bill counts."""
        if self.state in ("refused", "lost"):
            return 0.0
        return max(0.0, (self.ended or now) - self.asked) / 3600 * self.price_per_hour


def ledger_folder() -> Path:
    return user_folder("state") / "rented"


def this_laptop() -> str:
    """Six hexadecimal digits for this user of this computer. They outlive the ledger, so that a machine whose record
    was removed is still known as ours, and not as one of another laptop on the same account."""
    try:
        computer = Path("/etc/machine-id").read_text().strip()
    except OSError:
        computer = ""
    return hashlib.sha256(f"{computer or socket.gethostname()} {getpass.getuser()}".encode()).hexdigest()[:6]


class Ledger:
    def __init__(self, folder: Path | None = None):
        self.folder = folder or ledger_folder()

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Keeps other processes from renting or ending `name`. Raises SurgvqaError if one already does."""
        if not NAME.fullmatch(name):
            raise UsageError(f"name {name!r}: expected a to z, 0 to 9 and dashes, at most 40, a letter first")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self.folder / f".{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SurgvqaError(f"{name}: another command is renting or ending it; wait for that one") from None
            yield
        finally:
            os.close(descriptor)

    def write(self, record: Record) -> None:
        write_json_atomic(self._file(record.name), asdict(record))
        fsync_folder(self.folder)

    def read(self, name: str) -> Record | None:
        file = self._file(name)
        if not file.exists():
            return None
        record, wrong = read_as(Record, file, KINDS)
        if record and not wrong and record.state not in STATES:
            wrong = f"state is {record.state!r}, expected one of {', '.join(STATES)}"
        if record and not wrong and record.name != name:
            wrong = f"name is {record.name!r}, expected {name!r}"
        if wrong or not record:
            raise UsageError(
                f"{file}: {one_line(wrong)}; was it written by a newer surgvqa? Look for the machine in the "
                "provider's console, then mend or remove the file"
            )
        return record

    def records(self) -> list[Record]:
        """Those that can be read. A damaged file hides no other one: `damaged` tells of it."""
        return self._read_all()[0]

    def damaged(self) -> list[str]:
        """What is wrong with the files that cannot be read: each may stand for a machine that costs money."""
        return self._read_all()[1]

    def _read_all(self) -> tuple[list[Record], list[str]]:
        found: list[Record] = []
        wrong: list[str] = []
        for file in sorted(self.folder.glob("[a-z]*.json")):
            try:
                found += [record] if (record := self.read(file.stem)) else []
            except (SurgvqaError, OSError) as error:
                wrong.append(str(error))
        return found, wrong

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"
