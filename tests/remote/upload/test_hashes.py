"""Which hashes are remembered or believed, and what is read again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from remote.agent import files as agent
from remote.upload.hashes import Hashes, Item
from surgvqa.errors import UsageError


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
    hashes.forget(shard)
    assert sha256(hashes, shard) == hashlib.sha256(b"merged").hexdigest()


def test_checksum_reads_everything(tmp_path):
    shard = merged(tmp_path / "m")
    hashes = Hashes(tmp_path / "c", checksum=True)
    sha256(hashes, shard)
    sha256(hashes, shard)
    assert hashes.read_bytes == 2 * 6


@pytest.mark.parametrize("cache", ["[]", '{"x": 3}', "{", '{"x": [1, 2, 3, "old"]}'])
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
    assert agent.standing(str(there), item.wire())["state"] == "complete"
    status = (there / "m" / "model.safetensors").stat()
    (there / "m" / "model.safetensors").write_bytes(b"WEIGHTS")
    os.utime(there / "m" / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert agent.known(None, str(there), [item.wire()])["items"][0]["state"] == "complete"
    assert agent.known(None, str(there), [item.wire()], checksum=True)["items"][0]["have"] == []
    assert agent.standing(str(there), item.wire())["state"] != "complete"  # remembered
