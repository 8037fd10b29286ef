"""Writes a checkpoint folder tensor by tensor, with bounded memory; resumable, and never leaves a half-written output.

Everything is written to `<output>.partial`, which one rename turns into `<output>` at the end.

    <output>.partial/
        surgvqa_manifest.json            the inputs, the plan, and the sha256 of each finished shard
        model-00001-of-00004.safetensors a finished shard: fsynced, renamed, then entered in the manifest
        ….safetensors.writing            the current shard; never trusted, written again by the next run

- The **lock** is flock(2) on the `.partial` folder itself. It ends with the process and survives the rename.
- The **manifest** names the inputs (size, modification time, sha256 of each header) and the plan. A rerun with the same
  inputs and plan hashes the shards it finds and keeps the intact ones; with others it starts again and says why. A
  `.partial` folder without our manifest is refused, and nothing in it is touched. Only files that the manifest lists
  are ever deleted.
- A shard reaches the disk before it is entered in the manifest (fsync of the data, of the folder, then of the
  manifest). So after a power loss the manifest's shards are complete, and all others are written again.
- At the end the manifest becomes the report (`merge_report.json`), and the folder is renamed.

`shard_writer` writes the shards.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.filesize import decimal as human_bytes

from surgvqa.checkpoint.names import INDEX_FILE
from surgvqa.checkpoint.shard_writer import ShardWriter
from surgvqa.checkpoint.shards import Shard, index_of
from surgvqa.errors import SurgvqaError
from surgvqa.files import free_bytes, fsync_folder, sha256_file, write_json_atomic, write_synced
from surgvqa.machine.process import usable_cores
from surgvqa.runs.reporter import Reporter
from surgvqa.terminal.figures import counted

MANIFEST_FILE = "surgvqa_manifest.json"
MAX_WORKERS = 4  # two shards at once; more threads would mostly wait for the disk, and each needs 20 MB


def file_identity(file: Path) -> dict[str, Any]:
    """Size, modification time and sha256 of the beginning of a file: these identify its version without a full read."""
    with open(file, "rb") as stream:
        stat = os.fstat(stream.fileno())
        length = int.from_bytes(stream.read(8), "little") if file.suffix == ".safetensors" else 1 << 20
        stream.seek(0)
        beginning = stream.read(min(length + 8, 100_000_000))
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "head_sha256": hashlib.sha256(beginning).hexdigest()}


@dataclass
class NewCheckpoint:
    """The checkpoint to write, and its inputs."""

    output: Path
    shards: list[Shard]
    inputs: dict[str, Any]
    """A JSON object. Equal inputs give the same output, byte for byte."""
    report_file: str
    """The manifest becomes this file of the output."""
    side_files: dict[str, bytes] = field(default_factory=dict)
    """{name: content} of config.json, tokenizer files, …, which are small and written last."""

    def __post_init__(self) -> None:
        if self.output.is_symlink():  # mostly to another disk; `partial` must be on the disk of the output
            self.output = self.output.resolve()

    @property
    def partial(self) -> Path:
        return self.output.with_name(self.output.name + ".partial")

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.shards) + sum(map(len, self.side_files.values()))

    def plan_sha256(self) -> str:
        """Hash of every header: which tensors are in which shard, in which order."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(shard.file.encode() + b"\0" + shard.head)
        return digest.hexdigest()


def read_record(folder: Path, report_file: str) -> dict[str, Any] | None:
    """The manifest of a folder, or the report that it became; None if both are missing or damaged."""
    for name in (MANIFEST_FILE, report_file):
        with contextlib.suppress(OSError, ValueError):
            document = json.loads((folder / name).read_text(encoding="utf-8"))
            if isinstance(document, dict) and document.get("made_by") == "surgvqa":
                return document
    return None


def difference(record: dict[str, Any], checkpoint: NewCheckpoint) -> str | None:
    """Why a record belongs to another checkpoint, as a message; None if it belongs to this one."""
    if record.get("inputs") != checkpoint.inputs:
        stated = record.get("inputs")
        before = stated if isinstance(stated, dict) else {}
        changed = [k for k in {**before, **checkpoint.inputs} if before.get(k) != checkpoint.inputs.get(k)]
        return f"it was made from other inputs ({', '.join(sorted(changed)[:3])} differ)"
    if record.get("plan_sha256") != checkpoint.plan_sha256():
        return "it was made with another shard plan"
    return None


class Writer:
    """Writes a checkpoint and publishes its folder, resuming what an earlier run left. A context manager."""

    def __init__(self, checkpoint: NewCheckpoint, run: Reporter, workers: int | None = None):
        self.checkpoint, self.run = checkpoint, run
        self.workers = min(workers or usable_cores(), MAX_WORKERS)
        self.record: dict[str, Any] = {}
        self.reused: list[str] = []
        self._lock_fd: int | None = None
        self._made_partial = False

    def __enter__(self) -> Writer:
        try:
            self._lock()
            try:
                self._inspect_earlier()
            finally:
                self._drop_empty()
        except OSError as error:
            self._release()
            raise self._disk_error(error) from error
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    # -- lock and resume

    def _lock(self) -> None:
        partial = self.checkpoint.partial
        partial.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):
                partial.mkdir()
                self._made_partial = True
            if not partial.is_dir():
                raise SurgvqaError(f"{partial}: is not a folder; move it away")
            fd = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise SurgvqaError(
                    f"{self.checkpoint.output}: another process is writing it (holds {partial})"
                ) from None
            except OSError as error:  # a network file system without flock
                self.run.warning(f"{partial}: cannot be locked ({error.strerror}); do not start a second merge into it")
            with contextlib.suppress(FileNotFoundError):
                there = os.stat(partial)
                if (there.st_dev, there.st_ino) == (os.fstat(fd).st_dev, os.fstat(fd).st_ino):
                    self._lock_fd = fd
                    return
            os.close(fd)  # renamed between mkdir and flock: the other process has just finished

    def _release(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _drop_empty(self) -> None:
        """Removes the `.partial` folder if this process made it and it is still empty."""
        if self._made_partial:
            with contextlib.suppress(OSError):
                self.checkpoint.partial.rmdir()

    def _inspect_earlier(self) -> None:
        """Decides what to keep of an earlier `<output>` or `<output>.partial`."""
        checkpoint, output, partial = self.checkpoint, self.checkpoint.output, self.checkpoint.partial
        if output.exists() and not output.is_dir():
            raise SurgvqaError(f"{output}: is a file; name a folder for the output")
        if output.is_dir() and any(output.iterdir()):
            record = read_record(output, checkpoint.report_file)
            why = difference(record, checkpoint) if record else "it holds something else"
            if why:
                raise SurgvqaError(f"{output}: not empty, and {why}; name another folder or move it away")
            if any(partial.iterdir()):
                raise SurgvqaError(f"{partial}: exists beside a finished {output.name}; move one of them away")
            self.record = record or {}
            self._verify(output)
            if len(self.reused) == len(checkpoint.shards):
                return
            # A shard is damaged. The folder is ours, so it becomes the partial folder again and is repaired.
            partial.rmdir()
            os.rename(output, partial)
            self._release()
            self._made_partial = False
            self._lock()
        else:
            self._adopt_partial()
        self.record = {
            "made_by": "surgvqa",
            "complete": False,
            "inputs": checkpoint.inputs,
            "plan_sha256": checkpoint.plan_sha256(),
            "files": [s.file for s in checkpoint.shards]
            + sorted(checkpoint.side_files)
            + [INDEX_FILE, checkpoint.report_file],
            "shards": {n: s for n, s in self.record.get("shards", {}).items() if n in self.reused},
        }
        self._check_disk()
        write_json_atomic(partial / MANIFEST_FILE, self.record)
        fsync_folder(partial)

    def _adopt_partial(self) -> None:
        partial, names = self.checkpoint.partial, {f.name for f in self.checkpoint.partial.iterdir()}
        if not names:
            return
        record = read_record(partial, self.checkpoint.report_file)
        temporary = {n for n in names if n.startswith((f".{MANIFEST_FILE}.", f".{self.checkpoint.report_file}."))}
        if record is None:
            if names == temporary:  # an earlier run died while it wrote its first manifest
                self._delete(names)
                return
            raise SurgvqaError(f"{partial}: holds files that this command did not write; move it away")
        ours = {MANIFEST_FILE, *record.get("files", [])}
        ours |= {f"{name}.writing" for name in record.get("files", [])} | temporary
        foreign = sorted(names - ours)
        if foreign:
            raise SurgvqaError(f"{partial}: {foreign[0]} was not written by this command; move it away")
        why = difference(record, self.checkpoint)
        if why:
            self.run.warning(f"{partial}: {why}; starting again")
            self._delete(names - {MANIFEST_FILE})
            return
        self.record = record
        self._verify(partial)
        done = {MANIFEST_FILE, *self.reused}
        self._delete(names - done)
        if self.reused:
            kept = f"{len(self.reused)} of {len(self.checkpoint.shards)} shards are intact and kept"
            self.run.phase("resume", kept)
        elif record.get("shards"):
            self.run.warning(f"{partial}: none of its shards is intact; starting again")

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.checkpoint.partial / name).unlink()

    def _verify(self, folder: Path) -> None:
        """Hashes the shards that the record lists as finished, and keeps the intact ones."""
        claimed = self.record.get("shards", {})
        shards = [s for s in self.checkpoint.shards if s.file in claimed]
        total, done = sum(s.nbytes for s in shards), 0
        if shards:
            self.run.phase("verify", f"{counted(len(shards), 'shard')} from an earlier run")

        def count(n: int) -> None:
            nonlocal done
            done += n
            self.run.progress("verify", done, total, "bytes")

        for shard in shards:
            file = folder / shard.file
            if not file.is_file() or file.stat().st_size != shard.nbytes:
                self.run.warning(f"{file}: incomplete; it is written again")
            elif sha256_file(file, count) != claimed[shard.file]["sha256"]:
                self.run.warning(f"{file}: its content has changed; it is written again")
            else:
                self.reused.append(shard.file)

    def _check_disk(self) -> None:
        needed = self.checkpoint.nbytes - sum(s.nbytes for s in self.checkpoint.shards if s.file in self.reused)
        free = free_bytes(self.checkpoint.partial)
        if needed > free:
            raise SurgvqaError(
                f"{self.checkpoint.output}: needs {human_bytes(needed)}, {human_bytes(free)} are free; "
                "free some or name a folder on another disk"
            )

    # -- writing

    @property
    def finished(self) -> bool:
        """Whether the output was complete already, and verified."""
        return bool(self.record.get("complete"))

    def write_shards(self) -> None:
        """Writes every missing shard. Raises SurgvqaError for a full disk, which says what is kept."""
        todo = [s for s in self.checkpoint.shards if s.file not in self.reused]
        try:
            ShardWriter(self.checkpoint.partial, todo, self.workers, self.run, self.shard_done).run()
        except OSError as error:
            raise self._disk_error(error) from error
        except KeyboardInterrupt:
            kept = f"{len(self.record['shards'])} of {len(self.checkpoint.shards)} shards"
            self.run.warning(f"stopped: {kept} are kept in {self.checkpoint.partial}; run it again to resume")
            raise

    def publish(self, report: dict[str, Any]) -> None:
        """Writes side files and index, turns the manifest into the report, and renames the folder."""
        checkpoint, partial = self.checkpoint, self.checkpoint.partial
        try:
            for name, content in checkpoint.side_files.items():
                write_synced(partial / name, content)
            if len(checkpoint.shards) > 1:
                text = json.dumps(index_of(checkpoint.shards), indent=2) + "\n"
                write_synced(partial / INDEX_FILE, text.encode())
            self.record = {**self.record, **report, "complete": True}
            write_json_atomic(partial / MANIFEST_FILE, self.record)
            os.rename(partial / MANIFEST_FILE, partial / checkpoint.report_file)
            fsync_folder(partial)
            os.rename(partial, checkpoint.output)
            fsync_folder(checkpoint.output.parent)
        except OSError as error:
            raise self._disk_error(error) from error

    def shard_done(self, shard: Shard, sha256: str) -> None:
        """Enters a shard that is on the disk in the manifest."""
        stats = {s.name: found for s in shard.sources if (found := s.stats())}
        self.record["shards"][shard.file] = {"bytes": shard.nbytes, "sha256": sha256, "tensors": stats}
        write_json_atomic(self.checkpoint.partial / MANIFEST_FILE, self.record)
        fsync_folder(self.checkpoint.partial)
        done = len(self.record["shards"])
        self.run.emit(
            "shard", file=shard.file, bytes=shard.nbytes, sha256=sha256, done=done, total=len(self.checkpoint.shards)
        )

    def _disk_error(self, error: OSError) -> SurgvqaError:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            kept = f"{len(self.record.get('shards', {}))} of {len(self.checkpoint.shards)} shards"
            return SurgvqaError(
                f"{self.checkpoint.output}: the disk is full{where}; {kept} are kept in "
                f"{self.checkpoint.partial.name}: free some space and run it again to resume"
            )
        return SurgvqaError(f"{self.checkpoint.output}: cannot be written: {error.strerror or error}{where}")
