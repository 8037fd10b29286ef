"""The writer through every way of dying: killed, interrupted, a full disk, a power loss; and the rerun."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from checkpoint_kit import SHARDS, is_whole, new_checkpoint, read_tensors, write, write_folder
from places import ROOT
from waiting import until

from surgvqa.checkpoint import writer
from surgvqa.checkpoint.writer import MANIFEST_FILE
from surgvqa.errors import SurgvqaError

SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would we
sys.path[:0] = {path!r}
from pathlib import Path
from checkpoint_kit import Copy, new_checkpoint, write
fill = Copy.fill
def slow(self, start, out):
    time.sleep({delay})
    fill(self, start, out)
Copy.fill = slow
print("ready", flush=True)
write(new_checkpoint(Path({base!r}), Path({output!r})))
"""


def start(base: Path, output: Path, delay: float) -> subprocess.Popen[str]:
    """The writer in a process of its own, slowed down; returns once it is about to begin."""
    path = [str(ROOT), str(ROOT / "tests/kits")]
    script = textwrap.dedent(SCRIPT).format(path=path, base=str(base), output=str(output), delay=delay)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_kill_9_and_rerun(tmp_path: Path, base: Path, done: int) -> None:
    """Killed once `done` shards are entered in the manifest; the rerun keeps just those."""
    output, partial = tmp_path / "out", tmp_path / "out.partial"

    def entered() -> int:
        try:
            return len(json.loads((partial / MANIFEST_FILE).read_text())["shards"])
        except (OSError, ValueError):
            return -1

    process = start(base, output, 0.05)
    until(lambda: entered() >= done)
    process.kill()
    process.wait()
    assert not output.exists()
    kept = entered()
    recorder = write(new_checkpoint(base, output))
    is_whole(output, base)
    assert len(recorder.of("shard")) == len(new_checkpoint(base, output).shards) - kept
    assert bool(kept) == any(e["name"] == "resume" for e in recorder.of("phase"))


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, base: Path) -> None:
    process = start(base, tmp_path / "out", 0.05)
    until(lambda: list((tmp_path / "out.partial").glob("*.safetensors")))
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate()[1]
    assert not (tmp_path / "out").exists()
    recorder = write(new_checkpoint(base, tmp_path / "out"))
    is_whole(tmp_path / "out", base)
    assert any(e["name"] == "resume" for e in recorder.of("phase"))


def test_two_at_once(tmp_path: Path, base: Path) -> None:
    process = start(base, tmp_path / "out", 0.2)
    try:
        until(lambda: (tmp_path / "out.partial" / MANIFEST_FILE).exists())
        with pytest.raises(SurgvqaError, match="another process is writing it"):
            write(new_checkpoint(base, tmp_path / "out"))
    finally:
        process.kill()
        process.wait()
    write(new_checkpoint(base, tmp_path / "out"))
    is_whole(tmp_path / "out", base)


@pytest.mark.parametrize("seed", range(12))
def test_full_disk_at_any_byte(
    tmp_path: Path, sized: tuple[Path, int], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    output, (base, most) = tmp_path / "out", sized
    workers = 2 + 2 * (seed % 2)  # with four, two shards are at hand when the disk fills up
    room = random.Random(seed).randrange(sum(len(b) for b in read_tensors(base).values()))
    pwrite = os.pwrite

    def limited(fd: int, data: memoryview, position: int) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = min(room, len(data))
        room -= count
        return pwrite(fd, data[:count], position)

    monkeypatch.setattr(os, "pwrite", limited)
    with pytest.raises(SurgvqaError, match=r"the disk is full; \d+ of \d+ shards are kept in out\.partial: free some"):
        write(new_checkpoint(base, output, most), workers)
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert not output.exists()
    write(new_checkpoint(base, output, most), workers)
    is_whole(output, base)


def test_truly_full_disk(tmp_path: Path, base: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], capture_output=True).returncode
    )
    if not mounted:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(SurgvqaError, match=r"needs 11\.\d kB, 8\.2 kB are free"):
            write(new_checkpoint(base, disk / "out"))
        assert list(disk.iterdir()) == []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "free_bytes", lambda _: 10**9)  # the space went after the check
            with pytest.raises(SurgvqaError, match="the disk is full"):
                write(new_checkpoint(base, disk / "out"))
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        write(new_checkpoint(base, disk / "out"))
        is_whole(disk / "out", base)
    finally:
        subprocess.run(["umount", disk], check=True)


class Crash(BaseException):
    """The power goes."""


class Disk:
    """A disk that forgets on a crash what was not fsynced: data of files, and names in folders."""

    def __init__(self, patch: pytest.MonkeyPatch, steps: int):
        self.steps = steps
        self.dirty: set[int] = set()  # inodes
        self.renames: list[tuple[Path, Path, bytes | None]] = []
        self.real = {name: getattr(os, name) for name in ("pwrite", "fsync", "fdatasync", "rename", "replace")}
        for name in self.real:
            patch.setattr(os, name, getattr(self, name))

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Crash

    def pwrite(self, fd: int, data: memoryview, position: int) -> int:
        self.step()
        self.dirty.add(os.fstat(fd).st_ino)
        return self.real["pwrite"](fd, data, position)

    def fsync(self, fd: int) -> None:
        self.step()
        self.dirty.discard(os.fstat(fd).st_ino)
        folder = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.isdir(folder):
            self.renames = [r for r in self.renames if str(r[1].parent) != folder]

    fdatasync = fsync

    def rename(self, old: Path, new: Path) -> None:
        self.step()
        old, new = Path(old), Path(new)
        before = new.read_bytes() if new.is_file() else None
        self.real["rename"](old, new)
        self.renames.append((old, new, before))

    replace = rename

    def crash(self, folders: list[Path], chance: random.Random) -> None:
        """Undoes a random part of what is not on the disk yet: the kernel may have written some of it anyway."""
        for old, new, before in reversed(self.renames):
            if chance.random() < 0.5:
                continue
            if new.exists():
                self.real["rename"](new, old)
            if before is not None:
                new.write_bytes(before)
        for file in (f for place in folders if place.is_dir() for f in place.iterdir()):
            if file.stat().st_ino in self.dirty:
                size = file.stat().st_size
                kept = chance.randrange(size + 1)
                with open(file, "r+b") as stream:
                    stream.seek(kept)
                    stream.write(b"\0" * (size - kept))
                    stream.truncate(chance.choice((size, kept)))


@pytest.mark.parametrize("seed", range(25))
def test_power_loss_and_rerun(tmp_path: Path, sized: tuple[Path, int], seed: int) -> None:
    chance = random.Random(seed)
    output, partial, (base, most) = tmp_path / "out", tmp_path / "out.partial", sized
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, chance.randrange(90))
        with contextlib.suppress(Crash):
            write(new_checkpoint(base, output, most), workers=1)
        disk.crash([partial, output], chance)
    if output.exists():
        is_whole(output, base)  # the name is only ever given to a whole folder
    write(new_checkpoint(base, output, most))
    is_whole(output, base)


def test_other_inputs_start_again_and_say_so(tmp_path: Path, base: Path) -> None:
    process = start(base, tmp_path / "out", 0.05)
    until(lambda: list((tmp_path / "out.partial").glob("*.safetensors")))
    process.kill()
    process.wait()
    write_folder(base, [{n: (d, (s[0], s[1] + 1)) for n, (d, s) in shard.items()} for shard in SHARDS])
    recorder = write(new_checkpoint(base, tmp_path / "out"))
    assert "made from other inputs" in recorder.of("warning")[0]["text"]
    assert "starting again" in recorder.of("warning")[0]["text"]
    is_whole(tmp_path / "out", base)


def test_what_others_made_is_never_touched(tmp_path: Path, base: Path) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    for place in (output, partial):
        place.mkdir()
        (place / "thesis.tex").write_text("years of work")
        with pytest.raises(SurgvqaError, match="move it away"):
            write(new_checkpoint(base, output))
        assert (place / "thesis.tex").read_text() == "years of work"
        shutil.rmtree(place)
    assert not partial.exists()
    process = start(base, output, 0.05)
    until(lambda: (partial / MANIFEST_FILE).exists())
    process.kill()
    process.wait()
    (partial / "thesis.tex").write_text("years of work")
    with pytest.raises(SurgvqaError, match=r"thesis\.tex was not written by this command"):
        write(new_checkpoint(base, output))
    assert (partial / "thesis.tex").exists()
    output.write_text("a file")
    (partial / "thesis.tex").unlink()
    with pytest.raises(SurgvqaError, match="is a file"):
        write(new_checkpoint(base, output))
    assert output.read_text() == "a file"


def test_death_before_the_first_manifest_leaves_nothing_in_the_way(tmp_path: Path, base: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / f".{MANIFEST_FILE}.4711.tmp").write_text('{"made_by"')
    write(new_checkpoint(base, tmp_path / "out"))
    is_whole(tmp_path / "out", base)
