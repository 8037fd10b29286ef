"""`surgvqa-remote upload`: what is sent and which way, and what the host is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from shards import checkpoint, tree
from sshd import Relay, cmdline, laptop  # noqa: F401
from waiting import until

from remote.agent import files as agent_files
from remote.agent import protocol
from remote.paths import remote_name
from remote.upload import chunks, host_settings
from remote.upload import streams as transfer_room
from remote.upload.hashes import Hashes
from remote.upload.plan import Way, cheapest, folder_sources
from surgvqa.config.workspace import Workspace
from surgvqa.errors import UsageError
from surgvqa.runs.events import finished_event

pytestmark = pytest.mark.slow

MB = 1_000_000


def test_the_hosts_settings_say_what_ours_say(tmp_path):
    """Values that are none, paths below runs/, which the host makes itself, and letters that TOML wants escaped."""
    from surgvqa.config.workspace import load_workspace

    (tmp_path / "surgvqa.toml").write_text(
        'host = "h"\nboxes = "b.csv"\nframes_dir = "/data/my frames"\neval_data_path = ""\n'
        '[train]\noutput_dir = "runs/first"\nsave_total_limit = "none"\nrun_name = "q\\"\\u007f \\\\ ü"\n'
        '[evaluate]\ncheckpoint = "runs/first"\n'
    )
    there = tmp_path / "there"
    there.mkdir()
    (there / "surgvqa.toml").write_text(host_settings.host_settings(load_workspace(tmp_path)))
    read = load_workspace(there)
    assert read.values == {"frames_dir": str(there / "my frames"), "eval_data_path": None}
    first = str(there / "runs" / "first")
    train = {"output_dir": first, "save_total_limit": None, "run_name": 'q"\x7f \\ ü'}
    assert read.by_command == {"train": train, "evaluate": {"checkpoint": first}}


def test_settings_that_the_host_cannot_have_are_found_before_anything_is_sent(laptop):  # noqa: F811
    checkpoint(laptop.workspace / "merged", {"model.safetensors": 1000})
    (laptop.workspace / "surgvqa.toml").write_text('model_name_or_path = "merged"\nframes_dir = "venv/frames"\n')
    said = laptop.command("upload", "gpuhost", check=2).stderr
    assert "cannot have the name 'venv/frames'" in said and not laptop.there.exists()


def test_the_cheaper_way_depends_on_the_link():
    merged, adapter = Way("merged", [], 17_900 * MB), Way("adapter", [], 500 * MB, merge_bytes=17_400 * MB)
    assert cheapest([merged, adapter], 20 * MB).name == "adapter"
    assert cheapest([merged, adapter], 2000 * MB).name == "merged"


def test_the_merge_reports_hashes_are_used_and_not_trusted(tmp_path):
    folder = checkpoint(tmp_path / "m", {"a.safetensors": 100, "b.safetensors": 100})
    (folder / "merge_report.json").write_text(json.dumps({"shards": {"a.safetensors": {"sha256": "f" * 64}}}))
    later = (folder / "merge_report.json").stat().st_mtime_ns + 1
    hashes = Hashes(tmp_path / "cache.json")
    found = {e.path: e.sha256 for e in hashes.entries(folder_sources(folder))}
    assert found["a.safetensors"] == "f" * 64 and len(set(found["b.safetensors"])) > 1
    os.utime(folder / "a.safetensors", ns=(later, later))  # touched since the merge
    assert Hashes(tmp_path / "other.json").entries(folder_sources(folder))[-2].sha256 != "f" * 64


def test_chunks_cover_exactly_what_is_missing():
    entry = lambda size: type("E", (), {"size": size})  # noqa: E731
    chunk = transfer_room.CHUNK
    sizes = [3 * chunk + 5, 0, 7, protocol.SMALL, chunk]
    item = type("I", (), {"entries": [entry(size) for size in sizes]})
    found = chunks.chunks_of(item, {2, 4}, {0: [[chunk, chunk]]}, chunk)
    assert [(c.index, c.offset, c.length, c.files) for c in found] == [
        (1, 0, protocol.SMALL, (1, 3)), (0, 0, chunk, ()), (0, 2 * chunk, chunk, ()), (0, 3 * chunk, 5, ())
    ]  # fmt: skip


def data_workspace(folder: Path) -> None:
    """Two samples over three frames, an unneeded frame and an unneeded question."""
    for name in ("v1/v1_1.jpg", "v1/v1_2.jpg", "v2/v2_7.jpg", "v2/v2_8.jpg"):
        (folder / "frames" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "frames" / name).write_bytes(name.encode() * 10)
    for name in ("v1/q1.wav", "v2/q2.wav", "v2/q3.wav"):
        (folder / "audio" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "audio" / name).write_bytes(name.encode())
    samples = [
        {"id": "q1", "video_id": "v1", "frames": ["v1_1", "v1_2"]},
        {"id": "q2", "video_id": "v2", "frames": ["v2_7"]},
    ]
    common = {"question": "Is it?", "question_type": "t", "answer": "Yes it is.", "short_answer": "yes"}
    (folder / "train.jsonl").write_text("".join(json.dumps({**s, **common}) + "\n" for s in samples))
    (folder / "surgvqa.toml").write_text(
        'train_data_path = "train.jsonl"\nframes_dir = "frames"\naudio_dir = "audio"\n[train]\nmax_steps = 3\n'
    )


def test_the_command_sends_only_the_data_that_is_named(laptop):  # noqa: F811
    data_workspace(laptop.workspace)
    planned = laptop.json("upload", "gpuhost", "--what", "data", "--dry-run")
    assert planned["data"]["files"] == 6 and not (laptop.there / "train.jsonl").exists()
    laptop.json("upload", "gpuhost", "--what", "data")
    sent = tree(laptop.there)
    assert {n for n in sent if not n.startswith((".surgvqa", "surgvqa.toml"))} == {
        "train.jsonl", "frames/v1/v1_1.jpg", "frames/v1/v1_2.jpg", "frames/v2/v2_7.jpg", 
        "audio/v1/q1.wav", "audio/v2/q2.wav",
    }  # fmt: skip
    assert b'frames_dir = "frames"' in sent["surgvqa.toml"] and b"max_steps = 3" in sent["surgvqa.toml"]
    assert laptop.json("upload", "gpuhost", "--what", "data")["sent_bytes"] == 0
    (laptop.workspace / "frames" / "v1" / "v1_1.jpg").write_bytes(b"new")
    assert laptop.json("upload", "gpuhost", "--what", "data")["sent_bytes"] == 3
    assert (laptop.there / "frames" / "v1" / "v1_1.jpg").read_bytes() == b"new"
    (laptop.workspace / "frames" / "v1" / "v1_1.jpg").unlink()
    failed = laptop.command("upload", "gpuhost", "--what", "data", check=2)
    assert "v1_1" in failed.stderr.splitlines()[-1]


def test_files_deleted_or_replaced_here_are_named_and_removed_there(laptop):  # noqa: F811
    """A frame of another extension replaces its predecessor; the rest stays until --delete, which takes only ours."""
    data_workspace(laptop.workspace)
    laptop.json("upload", "gpuhost", "--what", "data")
    frames, there = laptop.workspace / "frames" / "v1", laptop.there / "frames" / "v1"
    (frames / "v1_1.jpg").rename(frames / "v1_1.png")
    lines = (laptop.workspace / "train.jsonl").read_text().splitlines(keepends=True)
    (laptop.workspace / "train.jsonl").write_text(lines[0])
    (laptop.there / "frames" / "v2" / "mine.jpg").write_text("somebody's own")
    done = laptop.command("upload", "gpuhost", "--what", "data", "--json")
    assert "frames/v2/v2_7.jpg" in done.stderr and "--delete" in done.stderr
    assert json.loads(done.stdout)["deleted"] == ["frames/v1/v1_1.jpg"]
    assert sorted(os.listdir(there)) == ["v1_1.png", "v1_2.jpg"]
    (laptop.there / "audio" / "v2" / "q2.wav").write_text("changed there")
    done = laptop.command("upload", "gpuhost", "--what", "data", "--delete", "--json")
    assert json.loads(done.stdout)["deleted"] == ["frames/v2/v2_7.jpg"]
    assert os.listdir(laptop.there / "frames" / "v2") == ["mine.jpg"]
    assert "audio/v2/q2.wav" in done.stderr and (laptop.there / "audio" / "v2" / "q2.wav").exists()


def test_nothing_starts_on_data_whose_publication_broke(tmp_path):
    """One file of a set of files was renamed, the next was not: whatever names one of them is not whole."""
    entry = [1, "0" * 64, 1]
    files = {"train.jsonl": entry, "frames/v1/v1_1.jpg": entry}
    agent_files.write_record(str(tmp_path), "data", {"kind": "files", "state": "publishing", "files": files})
    for path in ("train.jsonl", "frames", "frames/v1"):
        assert agent_files.unfinished(str(tmp_path), ["merged", path]) == path
    assert agent_files.unfinished(str(tmp_path), ["merged", "frame", "audio"]) is None
    agent_files.write_record(str(tmp_path), "data", {"kind": "files", "state": "ready", "files": files})
    assert agent_files.unfinished(str(tmp_path), ["train.jsonl"]) is None


def test_a_checkpoint_may_be_called_data(laptop):  # noqa: F811
    data_workspace(laptop.workspace)
    checkpoint(laptop.workspace / "data", {"model.safetensors": 1000})
    for _ in range(2):
        laptop.json("upload", "gpuhost", "--model_name_or_path", "data")
    again = laptop.json("upload", "gpuhost", "--model_name_or_path", "data")
    assert again["sent_bytes"] == 0 and tree(laptop.there / "data") == tree(laptop.workspace / "data")
    assert (laptop.there / "train.jsonl").is_file()


def test_a_detached_upload_is_a_run_of_its_own(laptop):  # noqa: F811
    checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 5 * MB})
    started = laptop.json("upload", "gpuhost", "--model_name_or_path", "merged", "--detach")
    folder = Path(started["folder"])
    until(lambda: finished_event(folder))
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events[-1]["state"] == "finished" and any(e["kind"] == "progress" for e in events)
    assert (laptop.there / "merged" / "model-1.safetensors").stat().st_size == 5 * MB


def test_nothing_to_upload_is_said(laptop):  # noqa: F811
    assert "nothing to upload" in laptop.command("upload", "gpuhost", check=2).stderr
    assert "no such folder" in laptop.command("upload", "gpuhost", "--model_name_or_path", "no", check=2).stderr
    with pytest.raises(UsageError):
        remote_name(laptop.workspace, Workspace(laptop.workspace, {}, {}))
