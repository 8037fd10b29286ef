"""Writes a checkpoint folder tensor by tensor: bounded memory, whole shards, resumable, never half-done.

Everything is written to `<output>.partial`; `<output>` appears at the end by one rename.

    <output>.partial/
        surgvqa_manifest.json            what is being made, from what, and the sha256 of each shard that is done
        model-00001-of-00004.safetensors a shard that is done: fsynced, renamed, then entered in the manifest
        ….safetensors.writing            the shard at hand; never trusted, written anew on the next try

- The **lock** is flock(2) on the `.partial` folder itself: it goes with the process, and a rename keeps it.
- The **manifest** names the inputs (size, modification time, sha256 of each header) and the plan. A rerun with the same
  inputs and plan hashes the shards it finds and keeps the whole ones; with others it starts again and says why. A
  `.partial` folder without our manifest is not ours: it is refused, and nothing in it is touched. Only files that the
  manifest lists are ever deleted.
- After a power loss a shard in the manifest was on the disk before it was entered (fsync of the data, of the folder,
  then of the manifest); whatever else is there is redone.
- At the end the manifest becomes the report (`merge_report.json`), and the folder is renamed.

`shard_writer` makes the shards themselves.
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
MAX_WORKERS = 4  # two shards at once; more threads would mostly wait for the disk, and each takes 20 MB


def file_identity(file: Path) -> dict[str, Any]:
    """What tells one version of a file from another without reading all of it: size, time, sha256 of the beginning."""
    with open(file, "rb") as stream:
        stat = os.fstat(stream.fileno())
        length = int.from_bytes(stream.read(8), "little") if file.suffix == ".safetensors" else 1 << 20
        stream.seek(0)
        beginning = stream.read(min(length + 8, 100_000_000))
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "head_sha256": hashlib.sha256(beginning).hexdigest()}


@dataclass
class Job:
    """What is to be written and what it is made of."""

    output: Path
    shards: list[Shard]
    inputs: dict[str, Any]
    """JSON; equal inputs give the same output, byte for byte."""
    report_file: str
    """The manifest ends as this file of the output."""
    side_files: dict[str, bytes] = field(default_factory=dict)
    """config.json, tokenizer files, …: small, written last."""

    def __post_init__(self) -> None:
        if self.output.is_symlink():  # to another disk, mostly: `partial` has to stand beside what it becomes
            self.output = self.output.resolve()

    @property
    def partial(self) -> Path:
        return self.output.with_name(self.output.name + ".partial")

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.shards) + sum(map(len, self.side_files.values()))

    def plan_sha256(self) -> str:
        """Of every header: which tensors, in which order, in which shard."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(shard.file.encode() + b"\0" + shard.head)
        return digest.hexdigest()


def read_record(folder: Path, report_file: str) -> dict[str, Any] | None:
    """The manifest of a folder, or the report that it became; None when neither is there or whole."""
    for name in (MANIFEST_FILE, report_file):
        with contextlib.suppress(OSError, ValueError):
            document = json.loads((folder / name).read_text(encoding="utf-8"))
            if isinstance(document, dict) and document.get("made_by") == "surgvqa":
                return document
    return None


def difference(record: dict[str, Any], job: Job) -> str | None:
    """Why a record is not of this job, in words; None when it is."""
    if record.get("inputs") != job.inputs:
        stated = record.get("inputs")
        before = stated if isinstance(stated, dict) else {}
        changed = [k for k in {**before, **job.inputs} if before.get(k) != job.inputs.get(k)]
        return f"it was made from other inputs ({', '.join(sorted(changed)[:3])} differ)"
    if record.get("plan_sha256") != job.plan_sha256():
        return "it was made with another shard plan"
    return None


class Writer:
    """Takes a job from nothing, or from what an earlier try left, to its published folder. A context manager."""

    def __init__(self, job: Job, run: Reporter, workers: int | None = None):
        self.job, self.run = job, run
        self.workers = min(workers or usable_cores(), MAX_WORKERS)
        self.record: dict[str, Any] = {}
        self.reused: list[str] = []
        self._lock_fd: int | None = None
        self._made_partial = False

    def __enter__(self) -> Writer:
        try:
            self._lock()
            try:
                self._take_over()
            finally:
                self._drop_empty()
        except OSError as error:
            self._release()
            raise self._explain(error) from error
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    # -- lock and resume

    def _lock(self) -> None:
        partial = self.job.partial
        partial.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):
                partial.mkdir()
                self._made_partial = True
            if not partial.is_dir():
                raise SurgvqaError(f"{partial}: is no folder; move it away")
            fd = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise SurgvqaError(f"{self.job.output}: another process is writing it (holds {partial})") from None
            except OSError as error:  # a network file system without flock
                self.run.warning(f"{partial}: cannot be locked ({error.strerror}); do not start a second one")
            with contextlib.suppress(FileNotFoundError):
                there = os.stat(partial)
                if (there.st_dev, there.st_ino) == (os.fstat(fd).st_dev, os.fstat(fd).st_ino):
                    self._lock_fd = fd
                    return
            os.close(fd)  # renamed between mkdir and flock: the other one has just finished

    def _release(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _drop_empty(self) -> None:
        """Takes back a `.partial` folder that this process made and has put nothing in."""
        if self._made_partial:
            with contextlib.suppress(OSError):
                self.job.partial.rmdir()

    def _take_over(self) -> None:
        """Looks at `<output>` and `<output>.partial` and settles what is kept."""
        job, output, partial = self.job, self.job.output, self.job.partial
        if output.exists() and not output.is_dir():
            raise SurgvqaError(f"{output}: is a file; name a folder for the output")
        if output.is_dir() and any(output.iterdir()):
            record = read_record(output, job.report_file)
            why = difference(record, job) if record else "it holds something else"
            if why:
                raise SurgvqaError(f"{output}: not empty, and {why}; name another folder or move it away")
            if any(partial.iterdir()):
                raise SurgvqaError(f"{partial}: stands beside a finished {output.name}; move one of them away")
            self.record = record or {}
            self._verify(output)
            if len(self.reused) == len(job.shards):
                return
            # Some shard is damaged: the folder is ours, so it becomes the partial one again and is mended.
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
            "inputs": job.inputs,
            "plan_sha256": job.plan_sha256(),
            "files": [s.file for s in job.shards] + sorted(job.side_files) + [INDEX_FILE, job.report_file],
            "shards": {n: s for n, s in self.record.get("shards", {}).items() if n in self.reused},
        }
        self._check_disk()
        write_json_atomic(partial / MANIFEST_FILE, self.record)
        fsync_folder(partial)

    def _adopt_partial(self) -> None:
        partial, names = self.job.partial, {f.name for f in self.job.partial.iterdir()}
        if not names:
            return
        record = read_record(partial, self.job.report_file)
        temporary = {n for n in names if n.startswith((f".{MANIFEST_FILE}.", f".{self.job.report_file}."))}
        if record is None:
            if names == temporary:  # died while the very first manifest was written
                self._delete(names)
                return
            raise SurgvqaError(f"{partial}: holds files that this command did not write; move it away")
        ours = {MANIFEST_FILE, *record.get("files", [])}
        ours |= {f"{name}.writing" for name in record.get("files", [])} | temporary
        foreign = sorted(names - ours)
        if foreign:
            raise SurgvqaError(f"{partial}: {foreign[0]} was not written by this command; move it away")
        why = difference(record, self.job)
        if why:
            self.run.warning(f"{partial}: {why}; starting again")
            self._delete(names - {MANIFEST_FILE})
            return
        self.record = record
        self._verify(partial)
        done = {MANIFEST_FILE, *self.reused}
        self._delete(names - done)
        if self.reused:
            kept = f"{len(self.reused)} of {len(self.job.shards)} shards are whole and kept"
            self.run.phase("resume", kept)
        elif record.get("shards"):
            self.run.warning(f"{partial}: none of its shards is whole; starting again")

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.job.partial / name).unlink()

    def _verify(self, folder: Path) -> None:
        """Hashes the shards that the record says are done; keeps those that are."""
        claimed = self.record.get("shards", {})
        shards = [s for s in self.job.shards if s.file in claimed]
        total, done = sum(s.nbytes for s in shards), 0
        if shards:
            self.run.phase("verify", f"{counted(len(shards), 'shard')} from an earlier try")

        def count(n: int) -> None:
            nonlocal done
            done += n
            self.run.progress("verify", done, total, "bytes")

        for shard in shards:
            file = folder / shard.file
            if not file.is_file() or file.stat().st_size != shard.nbytes:
                self.run.warning(f"{file}: not whole; it is written again")
            elif sha256_file(file, count) != claimed[shard.file]["sha256"]:
                self.run.warning(f"{file}: its content is not what was written; it is written again")
            else:
                self.reused.append(shard.file)

    def _check_disk(self) -> None:
        needed = self.job.nbytes - sum(s.nbytes for s in self.job.shards if s.file in self.reused)
        free = free_bytes(self.job.partial)
        if needed > free:
            raise SurgvqaError(
                f"{self.job.output}: needs {human_bytes(needed)}, {human_bytes(free)} are free; "
                "free some or name a folder on another disk"
            )

    # -- writing

    @property
    def finished(self) -> bool:
        """Whether the output stands already, verified."""
        return bool(self.record.get("complete"))

    def write_shards(self) -> None:
        """Writes every shard that is not there yet. SurgvqaError names a full disk and what is kept."""
        todo = [s for s in self.job.shards if s.file not in self.reused]
        try:
            ShardWriter(self.job.partial, todo, self.workers, self.run, self.shard_done).run()
        except OSError as error:
            raise self._explain(error) from error
        except KeyboardInterrupt:
            kept = f"{len(self.record['shards'])} of {len(self.job.shards)} shards"
            self.run.warning(f"stopped: {kept} are kept in {self.job.partial}; run it again to go on")
            raise

    def publish(self, report: dict[str, Any]) -> None:
        """Side files, index, the manifest turned report; then the rename."""
        job, partial = self.job, self.job.partial
        try:
            for name, content in job.side_files.items():
                write_synced(partial / name, content)
            if len(job.shards) > 1:
                text = json.dumps(index_of(job.shards), indent=2) + "\n"
                write_synced(partial / INDEX_FILE, text.encode())
            self.record = {**self.record, **report, "complete": True}
            write_json_atomic(partial / MANIFEST_FILE, self.record)
            os.rename(partial / MANIFEST_FILE, partial / job.report_file)
            fsync_folder(partial)
            os.rename(partial, job.output)
            fsync_folder(job.output.parent)
        except OSError as error:
            raise self._explain(error) from error

    def shard_done(self, shard: Shard, sha256: str) -> None:
        """Enters a shard, already on the disk, in the manifest."""
        stats = {s.name: found for s in shard.sources if (found := s.stats())}
        self.record["shards"][shard.file] = {"bytes": shard.nbytes, "sha256": sha256, "tensors": stats}
        write_json_atomic(self.job.partial / MANIFEST_FILE, self.record)
        fsync_folder(self.job.partial)
        done = len(self.record["shards"])
        self.run.emit(
            "shard", file=shard.file, bytes=shard.nbytes, sha256=sha256, done=done, total=len(self.job.shards)
        )

    def _explain(self, error: OSError) -> SurgvqaError:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            kept = len(self.record.get("shards", {}))
            return SurgvqaError(
                f"{self.job.output}: the disk is full{where}; {kept} of {len(self.job.shards)} shards are kept in "
                f"{self.job.partial.name}: free some space and run it again to go on"
            )
        return SurgvqaError(f"{self.job.output}: cannot be written: {error.strerror or error}{where}")
