"""Hashes, and what a run records of what it rests on."""

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from waiting import until

from surgvqa.provenance import hashes, record
from surgvqa.provenance.hashes import Hashes


@pytest.fixture
def data(tmp_path):
    """Two samples of one video, with frames, recordings and an adapter."""
    rows = []
    for folder in ("frames/v", "audio", "adapter"):
        (tmp_path / folder).mkdir(parents=True)
    for number in range(2):
        frames = [f"v_{number}", "v_9"]
        for frame in frames:
            (tmp_path / "frames" / "v" / f"{frame}.jpg").write_bytes(frame.encode())
        (tmp_path / "audio" / f"qa_{number}.wav").write_bytes(b"sound %d" % number)
        rows.append({"id": f"qa_{number}", "video_id": "v", "frames": frames, "question": f"{number}?",
                     "question_type": "t", "answer": "a", "short_answer": "a"})  # fmt: skip
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("adapter_model.safetensors", "adapter_config.json", "surgvqa.json", "optimizer.pt"):
        (tmp_path / "adapter" / name).write_text(name)
    for file in tmp_path.rglob("*"):
        os.utime(file, (1e9, 1e9))
    return {
        "eval_data_path": str(tmp_path / "eval.jsonl"),
        "frames_dir": str(tmp_path / "frames"),
        "audio_dir": str(tmp_path / "audio"),
        "checkpoint": str(tmp_path / "adapter"),
    }


def sha256sum(names: dict[str, Path]) -> str:
    """As a person would: sha256sum's list, sorted, hashed."""
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n" for name, path in names.items()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def test_the_inputs_of_a_run_are_hashed(data, tmp_path):
    told = []
    found = record.hash_inputs(data, Hashes(tmp_path / "cache"), told.append)
    assert told == [] and {name: row["files"] for name, row in found.items()} == {
        "eval_data_path": 1, "checkpoint": 2, "frames": 3, "audio": 2
    }  # fmt: skip
    root = Path(data["frames_dir"]) / "v"
    assert found["frames"]["sha256"] == sha256sum({n: root / f"{n}.jpg" for n in ("v_0", "v_1", "v_9")})
    weights = ("adapter_model.safetensors", "adapter_config.json")
    assert found["checkpoint"]["sha256"] == sha256sum({n: Path(data["checkpoint"]) / n for n in weights})
    assert found["eval_data_path"]["sha256"] == hashlib.sha256(Path(data["eval_data_path"]).read_bytes()).hexdigest()
    (root / "v_9.jpg").unlink()
    less = record.hash_inputs(data, Hashes(), told.append)
    assert {*less} == {*found} - {"frames"} and "frames: not hashed" in told[0] and "v_9" in told[0]


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(hashes, "sha256_file", lambda path, on_bytes: read.append(path.name) or path.read_text())
    monkeypatch.setattr(hashes.time, "time", lambda: time.time_ns() / 1e9 + 60)  # later: it has settled
    file = tmp_path / "a.bin"
    file.write_text("one")
    for _ in range(2):  # the second one from what the first left on the disk
        found = Hashes(tmp_path)
        assert [found.of_file(file), found.of_file(file)] == ["one", "one"]
        found.save()
    assert read == ["a.bin"]
    times = file.stat()
    file.write_text("two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the change time stays
    assert Hashes(tmp_path).of_file(file) == "two"
    (tmp_path / "hashes.json").write_text("{")
    assert Hashes(tmp_path).of_file(file) == "two"


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, monkeypatch):
    file = tmp_path / "a.bin"
    file.write_text("one")
    found = Hashes(tmp_path)
    found.of_file(file)
    found.save()
    assert not (tmp_path / "hashes.json").exists()


def test_a_stop_does_not_wait_for_what_is_left(tmp_path):
    """Of ten files that are being hashed no more is read once somebody stops it."""
    files = [tmp_path / f"{n}.bin" for n in range(10)]
    for file in files:
        file.write_bytes(b"x")
    read = []

    def on_bytes(count):
        read.append(count)
        if len(read) > 1:  # else it would hang on the scheduler how many others were read before anybody knew
            until(lambda: found._given_up)
        raise KeyboardInterrupt

    found = Hashes(on_bytes=on_bytes)
    with pytest.raises(KeyboardInterrupt):
        found.of_files(files)
    assert len(read) <= 2 * hashes.READERS < len(files), "each reader may have begun another one"
    found._on_bytes = read.append
    assert len(found.of_files(files)) == 10, "and can go on"


def test_the_cards_of_a_machine_are_recorded(monkeypatch):
    card = {"index": 0, "name": "NVIDIA H100", "uuid": "GPU-1", "memory_total_bytes": 85 << 30, "power_w": 90}
    monkeypatch.setattr(record.gpu, "sample_devices", lambda: [card])
    monkeypatch.setattr(record.gpu, "driver_version", lambda: ("580.1", "13.0"))
    found = record.surroundings()
    assert found["gpus"] == [{"name": "NVIDIA H100", "uuid": "GPU-1", "memory_total_bytes": 85 << 30}]
    assert (found["versions"]["nvidia-driver"], found["versions"]["cuda-of-driver"]) == ("580.1", "13.0")


def test_versions_and_the_commit_of_our_code(tmp_path):
    found = record.surroundings()
    assert {"surgvqa", "python", "pillow"} <= {*found["versions"]} and isinstance(found["gpus"], list)
    here = Path(record.surgvqa.__file__).parent
    if (here.parent / ".git").exists():
        head = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert found["git"]["commit"] == head.stdout.strip() and isinstance(found["git"]["dirty"], bool)
    (tmp_path / "__init__.py").write_text("")
    assert record.git_state(tmp_path) == {}, "in no repository"
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert record.git_state(tmp_path) == {}, "a package installed inside somebody's repository"
