"""What the writer writes, how much it holds, and what it leaves alone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_kit import PAGES, is_whole, new_checkpoint, read_tensors, write, write_folder

from surgvqa import files
from surgvqa.checkpoint import shard_writer, writer
from surgvqa.checkpoint.names import INDEX_FILE
from surgvqa.checkpoint.shards import Copy
from surgvqa.errors import SurgvqaError


def test_written_checkpoint_is_read_by_the_safetensors_library(tmp_path: Path, base: Path) -> None:
    recorder = write(new_checkpoint(base, tmp_path / "out"))
    is_whole(tmp_path / "out", base)
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(len(b) for b in read_tensors(base).values())
    last = recorder.of("progress")[-1]
    assert last["done"] == last["total"] and last["shard_done"] == last["shard_total"]
    assert [e["done"] for e in recorder.of("shard")] == list(range(1, len(recorder.of("shard")) + 1))
    deserialize = pytest.importorskip("safetensors").deserialize
    for file in (tmp_path / "out").glob("*.safetensors"):
        found = {n: bytes(t["data"]) for n, t in deserialize(file.read_bytes())}
        assert found.items() <= read_tensors(base).items()


@pytest.mark.parametrize("refused", [None, "when set", "when written"])
def test_past_the_page_cache_or_not_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str | None
) -> None:
    write_folder(tmp_path / "base", PAGES)
    monkeypatch.setattr("surgvqa.checkpoint.shards.BLOCK_BYTES", 5000)
    pwrite, control = os.pwrite, fcntl.fcntl
    direct, cached = [], []

    def is_direct(fd: int) -> bool:
        return bool(control(fd, fcntl.F_GETFL) & os.O_DIRECT)

    def write_some(fd: int, data: memoryview, position: int) -> int:
        if is_direct(fd) and refused == "when written" and position >= 8192:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        (direct if is_direct(fd) else cached).append((position, len(data)))
        return pwrite(fd, data, position)

    def set_flags(fd: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & os.O_DIRECT and refused == "when set":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return control(fd, command, value)

    monkeypatch.setattr(os, "pwrite", write_some)
    monkeypatch.setattr(fcntl, "fcntl", set_flags)
    write(new_checkpoint(tmp_path / "base", tmp_path / "out", 30_000))
    monkeypatch.undo()
    is_whole(tmp_path / "out", tmp_path / "base")
    with open(tmp_path / "probe", "wb") as probe, contextlib.suppress(OSError):
        control(probe.fileno(), fcntl.F_SETFL, os.O_WRONLY | os.O_DIRECT)
        assert bool(direct) == (refused != "when set")  # this file system takes O_DIRECT
    if refused is None:
        assert all(position % 4096 == length % 4096 == 0 for position, length in direct)
        assert all(length < 4096 for _, length in cached) or not direct


@pytest.mark.parametrize("workers", [1, 2, 4, 7])
def test_any_number_of_workers_writes_the_same(
    tmp_path: Path, sized: tuple[Path, int], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """From four workers on several shards are made at once; each block takes its own time."""
    fill, chance = Copy.fill, random.Random(workers)

    def at_its_own_pace(self: Copy, start: int, out: memoryview) -> None:
        time.sleep(chance.random() / 500)
        fill(self, start, out)

    monkeypatch.setattr(Copy, "fill", at_its_own_pace)
    base, most = sized
    recorder = write(new_checkpoint(base, tmp_path / "out", most), workers)
    is_whole(tmp_path / "out", base)
    done = [e["done"] for e in recorder.of("progress")]
    assert done == sorted(done) and done[-1] == recorder.of("progress")[-1]["total"]
    order = [e["shard"] for e in recorder.of("progress")]
    turns = sum(a != b for a, b in itertools.pairwise(order)) + 1
    shards = len(recorder.of("shard"))
    assert turns == shards if workers < 4 else turns > shards


@pytest.mark.parametrize("workers", [2, 16])
def test_what_is_held_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """However many the workers and however slow the disk; a tensor that is larger than the bound is held alone.

    A worker that may not begin a block prepares what is to come.
    """
    monkeypatch.setattr(shard_writer, "BUFFER_BYTES", 8192)
    monkeypatch.setattr(writer, "MAX_WORKERS", 16)
    room = shard_writer.MAX_BLOCKS * 8192
    small = {f"small.{i}": ("BF16", (30, 40 + i)) for i in range(40)}
    write_folder(tmp_path / "base", [small, {"large": ("BF16", (30, 3000)), **{f"x.{n}": s for n, s in small.items()}}])
    checkpoint = new_checkpoint(tmp_path / "base", tmp_path / "out", 30 * 6000)
    assert len(checkpoint.shards) > 1 and room < 30 * 6000
    begin, pwrite, held, full = shard_writer.ShardWriter._begin, os.pwrite, [], threading.Event()
    prepared: list[str] = []
    monkeypatch.setattr(Copy, "prepare", lambda self: prepared.append(self.name))

    def watched(self: shard_writer.ShardWriter) -> Any:
        block = begin(self)
        if block:
            held.append((self.block_bytes, len(block.buffer)))
        elif self.block_bytes + 8192 > room:
            full.set()
        return block

    def slow(fd: int, data: memoryview, position: int) -> int:
        assert full.wait(20), "the workers stopped before what they may hold was full"
        return pwrite(fd, data, position)

    monkeypatch.setattr(shard_writer.ShardWriter, "_begin", watched)
    monkeypatch.setattr(os, "pwrite", slow)
    write(checkpoint, workers)
    assert all(total <= room or total == block for total, block in held)
    assert max(total for total, _ in held) > room
    assert prepared and len(set(prepared)) == len(prepared)
    monkeypatch.undo()
    is_whole(tmp_path / "out", tmp_path / "base")


def test_one_shard_has_no_index(tmp_path: Path, base: Path) -> None:
    write(new_checkpoint(base, tmp_path / "out", 10**9))
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "out" / INDEX_FILE).exists()
    assert read_tensors(tmp_path / "out") == read_tensors(base)


def test_a_damaged_shard_is_found_and_written_again(tmp_path: Path, base: Path) -> None:
    write(new_checkpoint(base, tmp_path / "out"))
    victim = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    content = bytearray(victim.read_bytes())
    content[-3] ^= 1
    victim.write_bytes(content)
    recorder = write(new_checkpoint(base, tmp_path / "out"))
    assert [e["file"] for e in recorder.of("shard")] == [victim.name]
    assert "its content has changed" in recorder.of("warning")[0]["text"]
    is_whole(tmp_path / "out", base)


def test_empty_output_folder_is_taken(tmp_path: Path, base: Path) -> None:
    (tmp_path / "out").mkdir()
    write(new_checkpoint(base, tmp_path / "out"))
    is_whole(tmp_path / "out", base)


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link_is_written_where_it_leads(tmp_path: Path, base: Path, there: bool) -> None:
    """To another disk, mostly: nothing of it may land beside the link, and the link stays."""
    large = tmp_path / "large disk" / "out"
    large.parent.mkdir()
    if there:
        large.mkdir()
    (tmp_path / "small").mkdir()
    link = tmp_path / "small" / "merged"
    link.symlink_to(large)
    write(new_checkpoint(base, link))
    is_whole(large, base)
    assert link.is_symlink() and [f.name for f in link.parent.iterdir()] == ["merged"]


def test_disk_is_checked_first(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "free_bytes", lambda _: 5_000)
    checkpoint = new_checkpoint(base, tmp_path / "deep" / "er" / "out")
    text = r"needs 1\d\.\d kB, 5\.0 kB are free; free some or name a folder on another"
    with pytest.raises(SurgvqaError, match=text):
        write(checkpoint)
    assert list((tmp_path / "deep" / "er").iterdir()) == []


def test_base_that_changes_under_the_merge_is_an_error(tmp_path: Path, base: Path) -> None:
    checkpoint = new_checkpoint(base, tmp_path / "out")
    file = base / "model-00003-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(SurgvqaError, match="the file changed while it was read"):
        write(checkpoint)
    assert not (tmp_path / "out").exists()


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    files.write_json_atomic(tmp_path / "x.json", {"a": 1})
    assert [f.name for f in tmp_path.iterdir()] == ["x.json"]
