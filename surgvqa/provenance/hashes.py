"""SHA-256 of files and folders of weights. Hashes are stored with a file's size and times, to read each file once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from surgvqa.errors import UsageError
from surgvqa.files import read_json, sha256_file, write_json_atomic

FILE = "hashes.json"
SETTLED_S = 2.0
"""The hash of a file that changed less than this before it was read is not stored, since the file could change again
within one tick of the clock."""
WEIGHTS = (".safetensors", ".json", ".txt", ".jinja", ".model")
"""Files of a checkpoint or an adapter that affect its answers: weights, configuration, tokenizer."""
NOT_WEIGHTS = ("surgvqa.json", "trainer_state.json", "run.json", "report.json")
READERS = 4


class Hashes:
    """Hashes of files, stored in `folder` if given. `on_bytes` is called, in any thread, with numbers of bytes read."""

    def __init__(self, folder: Path | None = None, on_bytes: Callable[[int], None] | None = None) -> None:
        self._on_bytes = on_bytes
        self._given_up = False
        self._file = folder / FILE if folder else None
        self._known: dict[str, list[object]] = {}
        self._changed = False
        if self._file and self._file.is_file():
            with contextlib.suppress(UsageError):  # a damaged store: hash the files again
                self._known = read_json(self._file)

    def of_file(self, path: str | os.PathLike[str]) -> str:
        """SHA-256 of a file's bytes. Raises OSError when it cannot be read."""
        real = os.path.realpath(path)
        state = os.stat(real)
        # programs cannot set the change time, so a modified file never looks unchanged
        stamp: list[object] = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
        known = self._known.get(real)
        if isinstance(known, list) and known[:-1] == stamp and isinstance(known[-1], str):
            return known[-1]
        found = sha256_file(Path(real), self._read)
        if time.time() - max(state.st_mtime, state.st_ctime) > SETTLED_S:
            self._known[real] = [*stamp, found]
            self._changed = True
        return found

    def _read(self, count: int) -> None:
        if self._given_up:
            raise InterruptedError("stopped while files were hashed")
        if self._on_bytes:
            self._on_bytes(count)

    def of_files(self, paths: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
        """{path: hash} of many files, read in several threads."""
        wanted = list(dict.fromkeys(os.fspath(path) for path in paths))
        with ThreadPoolExecutor(READERS, thread_name_prefix="hash") as pool:
            try:
                return dict(zip(wanted, pool.map(self.of_file, wanted)))
            except BaseException:  # a stop or an unreadable file; leaving the block waits for the files being read
                self._given_up = True
                pool.shutdown(cancel_futures=True)
                self._given_up = False
                raise

    def of_weights(self, folder: str | os.PathLike[str]) -> str:
        """The hash of a checkpoint or adapter folder, from the names and hashes of its WEIGHTS files."""
        return self.of_named({path.name: path for path in weight_files(folder)})

    def of_named(self, files: Mapping[str, Path]) -> str:
        """The hash of several files: that of a sorted list of lines "<sha256>  <name>", as sha256sum prints them."""
        found = self.of_files(files.values())
        lines = sorted(f"{found[os.fspath(path)]}  {name}\n" for name, path in files.items())
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()

    def save(self) -> None:
        """Stores the hashes. A full disk only loses the store."""
        if self._file and self._changed:
            with contextlib.suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_json_atomic(self._file, self._known)


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of a checkpoint or adapter folder that affect its answers."""
    return sorted(
        path
        for path in Path(folder).iterdir()
        if path.suffix in WEIGHTS and path.name not in NOT_WEIGHTS and not path.name.startswith(".") and path.is_file()
    )
