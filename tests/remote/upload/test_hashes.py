"""Which hashes are remembered or believed, and what is read again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from remote.agent import standing as agent
from remote.upload import hashes as hash_room
from remote.upload.chunks import Chunk
from remote.upload.hashes import Hashes, Item
from remote.upload.streams import Stream
from surgvqa.errors import SurgvqaError, UsageError


def merged(folder: Path) -> Path:
    """A shard whose hash a merge report of ours knows."""
    folder.mkdir()
    shard = folder / "model.safetensors"
    shard.write_bytes(b"merged")
    sha256 = hashlib.sha256(b"merged").hexdigest()
    (folder / "merge_report.json").write_text(json.dumps({"shards": {shard.name: {"sha256": sha256}}}))
    return shard


def sha256(hashes: Hashes, file: Path) -> str:
    return hashes.entries([(file, file.name)])[0].sha256


def test_a_shard_replaced_by_an_older_file_is_read(tmp_path):
    """Its mtime lies before the merge report's: only the time of change tells."""
    shard = merged(tmp_path / "m")
    assert Hashes(tmp_path / "cache").entries([(shard, "a")]) and sha256(hashes := Hashes(tmp_path / "c"), shard)
    assert hashes.read_bytes == 0  # the report is used
    older = tmp_path / "older"
    older.write_bytes(b"older!")
    os.utime(older, (1, 1))
    os.replace(older, shard)
    right = hashlib.sha256(b"older!").hexdigest()
    assert sha256(Hashes(tmp_path / "c"), shard) == right  # with a remembered hash
    assert sha256(Hashes(tmp_path / "new cache"), shard) == right  # without


def test_an_edit_that_keeps_size_mtime_and_inode_is_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"one")
    sha256(Hashes(tmp_path / "c"), file)
    status = file.stat()
    with open(file, "r+b") as stream:
        stream.write(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sha256(Hashes(tmp_path / "c"), file) == hashlib.sha256(b"two").hexdigest()


def test_a_hash_that_turned_out_wrong_is_not_taken_from_the_report_again(tmp_path):
    shard = merged(tmp_path / "m")
    report = shard.parent / "merge_report.json"
    report.write_text(report.read_text().replace(hashlib.sha256(b"merged").hexdigest(), "f" * 64))
    hashes = Hashes(tmp_path / "c")
    assert sha256(hashes, shard) == "f" * 64
    hashes.forget(str(shard))
    assert sha256(hashes, shard) == hashlib.sha256(b"merged").hexdigest()


def test_checksum_reads_everything(tmp_path):
    shard = merged(tmp_path / "m")
    hashes = Hashes(tmp_path / "c", checksum=True)
    sha256(hashes, shard)
    sha256(hashes, shard)
    assert hashes.read_bytes == 2 * 6


@pytest.mark.parametrize(
    "cache",
    [
        "[]",
        '{"x": 3}',
        "{",
        '{"x": [1, 2, 3, "old"]}',
        "[" * 100_000,
        json.dumps({"x": "1 2 3 4 " + "\x1b" * 64}),
        '{"x": "ab"}',
    ],
)
def test_a_damaged_cache_is_no_cache(tmp_path, cache):
    (tmp_path / "c").write_text(cache)
    assert Hashes(tmp_path / "c").cache == {}


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "frame.jpg")
    with pytest.raises(UsageError, match=r"frame\.jpg: no regular file"):
        sha256(Hashes(tmp_path / "c"), tmp_path / "frame.jpg")


def test_the_host_finds_what_was_changed_there_with_its_size_and_time_kept(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there / "m"):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
    item = Item("m", "folder", Hashes(tmp_path / "c").entries([(here / "model.safetensors", "model.safetensors")]))
    wire = {**item.offer, "files": item.rows}
    assert agent.standing(str(there), wire)["state"] == "complete"
    agent.settle(str(there), wire)
    status = (there / "m" / "model.safetensors").stat()
    (there / "m" / "model.safetensors").write_bytes(b"WEIGHTS")
    os.utime(there / "m" / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert agent.known(None, str(there), [wire])["items"][0]["state"] == "complete"
    assert agent.known(None, str(there), [wire], checksum=True)["items"][0]["have"] == []
    assert agent.standing(str(there), wire)["state"] != "complete"  # remembered


def test_a_file_that_changed_just_now_is_read_again(tmp_path, monkeypatch):
    """Of two changes within one tick of the clock the second shows in nothing that stat(2) tells."""
    file = tmp_path / "a.jsonl"
    monkeypatch.setattr(hash_room, "_identity", lambda status: "same ")
    file.write_bytes(b"one")
    sha256(Hashes(tmp_path / "c"), file)
    file.write_bytes(b"two")
    assert sha256(Hashes(tmp_path / "c"), file) == hashlib.sha256(b"two").hexdigest()


def test_a_file_that_has_settled_is_not_read_again(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"one")
    monkeypatch.setattr(hash_room, "SETTLED_NS", -1)
    sha256(Hashes(tmp_path / "c"), file)
    again = Hashes(tmp_path / "c")
    assert sha256(again, file) == hashlib.sha256(b"one").hexdigest() and again.read_bytes == 0


@pytest.mark.parametrize("reported", ["ab", "\x1b" * 64, "F" * 64, 7, None])
def test_a_report_of_no_hash_is_no_report(tmp_path, reported):
    shard = merged(tmp_path / "m")
    (shard.parent / "merge_report.json").write_text(json.dumps({"shards": {shard.name: {"sha256": reported}}}))
    assert sha256(Hashes(tmp_path / "c"), shard) == hashlib.sha256(b"merged").hexdigest()


def test_a_report_that_is_nested_too_deeply_is_no_report(tmp_path):
    shard = merged(tmp_path / "m")
    (shard.parent / "merge_report.json").write_text("[" * 100_000)
    assert sha256(Hashes(tmp_path / "c"), shard) == hashlib.sha256(b"merged").hexdigest()


@pytest.mark.parametrize(
    "pointer",
    [
        b"version https://git-lfs.github.com/spec/v1\r\noid sha256:0\r\n",
        b"\xef\xbb\xbfversion https://git-lfs.github.com/spec/v1\n",
        b"version https://hawser.github.com/spec/v1\n",
        b"# xet version 0\nfilesize = 5\n",
    ],
)
def test_a_pointer_is_not_the_file(tmp_path, pointer):
    (tmp_path / "tokenizer.json").write_bytes(pointer)
    with pytest.raises(UsageError, match="pointer, not the file itself"):
        sha256(Hashes(tmp_path / "c"), tmp_path / "tokenizer.json")


def test_small_files_are_read_once_and_few_of_them_kept(tmp_path, monkeypatch):
    """What was hashed is what is sent; a change after that is noticed before anything is published."""
    monkeypatch.setattr(hash_room, "KEPT_BYTES", 2500)
    files = {name: name.encode() * 1000 for name in "abc"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = Hashes(tmp_path / "cache.json")
    item = Item("data", "files", found.entries([(tmp_path / name, name) for name in files]))
    assert set(found.contents) == {str(tmp_path / "a"), str(tmp_path / "b")}
    (tmp_path / "a").write_bytes(b"x" * 1000)
    stream = Stream(SimpleNamespace(item=item, contents=found.contents))
    sent = stream._pack(Chunk(0, 0, 3000, (0, 1, 2)))
    assert sent.endswith(b"a" * 1000 + b"b" * 1000 + b"c" * 1000) and not found.contents
    assert stream._pack(Chunk(0, 0, 1000, (0,))).endswith(b"x" * 1000), "sent again after a lost connection"
    (tmp_path / "a").write_bytes(b"x" * 999)
    with pytest.raises(SurgvqaError, match="changed while it was sent"):
        stream._pack(Chunk(0, 0, 1000, (0,)))
