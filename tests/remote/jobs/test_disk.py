"""`surgvqa-remote disk`: what lies on the host, and that only what is ours and unused is removed."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path

import pytest
from sshd import laptop, start, stub_train  # noqa: F401
from waiting import until

from remote.agent import disk
from remote.agent import files as agent_files
from surgvqa.errors import SurgvqaError, UsageError


def put(file: Path, size: int = 1000, seed: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(random.Random(seed).randbytes(size))
    return file


def publish(there: Path, name: str, paths: list[str], kind: str = "folder", **more: object) -> None:
    """Files and the record that an upload would have left."""
    root, files = there / name if kind == "folder" else there, {}
    for path in paths:
        status = put(root / path).stat()
        files[path] = [status.st_size, agent_files.sha256_of(str(root / path)), status.st_mtime_ns, 0o644]
    record = {"kind": kind, "digest": "0" * 40, "state": "ready", "files": files, "stale": {}, "adopted": []}
    agent_files.write_record(str(there), name, {**record, **more})


def staging(there: Path, digest: str, name: str, size: int) -> Path:
    folder = there / ".surgvqa/staging" / digest
    put(folder / "tree/model.safetensors", size)
    (folder / "manifest.json").write_text(json.dumps({"name": name, "kind": "folder", "digest": digest, "files": []}))
    return folder


def run_folder(there: Path, run: str, **info: object) -> Path:
    """A run of a process that has ended; of this one with `pid`."""
    folder = there / "runs" / run
    folder.mkdir(parents=True)
    known = {"v": 1, "id": run, "command": "train", "argv": ["train"], "cwd": str(there), "started": 1.0, "pid": 1}
    (folder / "run.json").write_text(json.dumps({**known, **info}))
    return folder


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A workspace on a host with one of everything."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    folder = Path(os.path.realpath(tmp_path)) / "surgvqa"
    publish(folder, "merged", ["config.json", "model.safetensors"])
    publish(folder, "data", ["train.jsonl", "frames/v1/a.jpg", "frames/v1/b.jpg"], "files")
    put(folder / "frames/v1/mine.jpg")
    staging(folder, "a" * 40, "other", 300_000)
    run_folder(folder, "r-done")
    put(folder / "my notes/thesis.tex")
    return folder


def rows(there: Path, venv: str = "venv") -> dict[str, dict]:
    found = disk.disk(None, str(there), venv)
    assert found["complete"] and not found["more"]
    return {f"{row['kind']}:{row['name']}": row for row in found["entries"]}


def remove(there: Path, *names: str) -> list[str]:
    return disk.clean(None, str(there), "venv", list(names))["cleaned"]


def test_each_thing_has_a_kind_a_size_and_an_age(there):
    found = rows(there)
    ours = {name for name, row in found.items() if row["ours"]}
    assert ours == {"checkpoint:merged", "data:data", "run:runs/r-done", "staging:staging/aaaaaaaaaaaa"}
    assert set(found) - ours == {"unknown:frames", "unknown:my notes", "records:.surgvqa"}
    staged, data = found["staging:staging/aaaaaaaaaaaa"], found["data:data"]
    assert 300_000 <= staged["bytes"] < 400_000 and staged["note"] == "upload of other"
    assert data["files"] == 3 and found["unknown:frames"]["files"] == 1 and 0 <= data["age_s"] < 60


def test_only_what_is_named_and_ours_goes(there):
    assert remove(there, "data", "staging", "runs/r-done") == ["data", "staging/aaaaaaaaaaaa", "runs/r-done"]
    assert not (there / "train.jsonl").exists() and not list((there / "runs").glob("*"))
    assert [p.name for p in (there / "frames").rglob("*") if p.is_file()] == ["mine.jpg"]
    assert (there / "merged/model.safetensors").exists() and (there / "my notes/thesis.tex").exists()
    assert set(rows(there)) == {"checkpoint:merged", "unknown:frames", "unknown:my notes", "records:.surgvqa"}
    remove(there, "merged")
    assert not (there / "merged").exists() and not agent_files.records(str(there))


@pytest.mark.parametrize("name", ["my notes", "nothing", "..", "/etc", "frames", ".surgvqa", "runs", "runs/../.."])
def test_what_is_not_ours_stays(there, name):
    before = sorted(str(p) for p in there.rglob("*"))
    with pytest.raises(UsageError, match=r"nothing of ours|not removed from here"):
        remove(there, "merged", name)
    after = {str(p) for p in there.rglob("*")} - {str(there / ".surgvqa/lock")}
    assert sorted(after) == before, "nothing goes when one of the names is wrong"


def test_a_checkpoint_with_other_files_in_it_stays(there):
    put(there / "merged/my_eval.json")
    with pytest.raises(UsageError, match=r"my_eval\.json in it is not what was published"):
        remove(there, "merged")
    (there / "merged/my_eval.json").unlink()
    (there / "merged/config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"config\.json"):
        remove(there, "merged")


def test_changed_data_and_links_stay(there):
    (there / "train.jsonl").write_text("mine now")
    outside = put(there.parent / "outside.jpg")
    frame = there / "frames/v1/a.jpg"
    frame.unlink()
    frame.symlink_to(outside)
    remove(there, "data")
    assert (there / "train.jsonl").read_text() == "mine now" and frame.is_symlink() and outside.exists()
    assert not (there / "frames/v1/b.jpg").exists()


def test_what_lay_there_before_the_upload_stays(there):
    publish(there, "old", ["config.json"], adopted=["config.json"])
    with pytest.raises(UsageError, match="before the upload"):
        remove(there, "old")


def test_two_things_of_one_name_are_told_apart(there):
    publish(there, "data", ["config.json"])
    with pytest.raises(UsageError, match="data: may be checkpoint:data or data:data"):
        remove(there, "data")
    remove(there, "checkpoint:data")
    assert (there / "train.jsonl").exists() and not (there / "data").exists()


def running(there: Path, **options: str) -> Path:
    from surgvqa.runs.process import process_identity

    noted = {name: {"value": value, "from": "command line"} for name, value in options.items()}
    return run_folder(there, "r-now", pid=os.getpid(), identity=process_identity(os.getpid()), options=noted)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"model_name_or_path": "merged"}, ["merged"]),
        ({"frames_dir": "frames"}, ["data"]),
        ({"train_data_path": "./train.jsonl"}, ["data"]),
        ({"resume": "r-done"}, ["runs/r-done"]),
        ({"output_dir": "runs/r-done/adapter"}, ["runs/r-done"]),
        ({}, ["merged", "data", "runs/r-done"]),  # it has not said yet what it uses
    ],
)
def test_what_a_running_job_uses_stays(there, options, names):
    folder = running(there, **options)
    for name in [*names, "runs/r-now"]:
        with pytest.raises(SurgvqaError, match="in use by r-now"):
            remove(there, name)
    assert folder.exists() and (there / "merged/config.json").exists() and (there / "train.jsonl").exists()
    (folder / "events.jsonl").write_text('{"v": 1, "t": 1.0, "kind": "finished", "state": "finished"}\n')
    remove(there, *names, "runs/r-now")
    assert not folder.exists()


def test_odd_folders_are_measured_and_removed(there):
    """FIFOs, dangling and looping links, names of other encodings, with escape sequences, without permissions."""
    run = there / "runs/r-done"
    os.mkfifo(run / "pipe")
    (run / "loop").symlink_to(run)
    (run / "gone").symlink_to("nowhere")
    (there / "evil \x1b[2J").mkdir()
    put(there / "evil \x1b[2J" / "x")
    Path(os.fsdecode(os.fsencode(there) + b"/caf\xe9")).write_bytes(b"1")
    home = os.open(run, os.O_RDONLY)
    for _ in range(1500):  # deeper than a path may be long, and than Python recurses
        os.mkdir("deep", dir_fd=home)
        below = os.open("deep", os.O_RDONLY, dir_fd=home)
        os.close(home)
        home = below
    os.close(home)
    run.chmod(0)
    (there / ".surgvqa/merges").mkdir()
    (there / ".surgvqa/merges/x.json").write_text("[")
    (there / ".surgvqa/ready/y.json").write_text('{"files": {"../../z": [1, "a", 1]}, "name": "../y"}')
    (there / ".surgvqa/staging/bad").mkdir()
    (there / ".surgvqa/staging/bad/manifest.json").write_text("[1]")
    (there / ".surgvqa/staging/waits").mkdir()
    os.mkfifo(there / ".surgvqa/staging/waits/manifest.json")
    os.mkfifo(there / ".surgvqa/ready/waits.json")
    (there / ".surgvqa/ready/deep.json").write_text("[" * 200_000)
    (there / ".surgvqa/ready/kind.json").write_text('{"files": {}, "name": 7, "kind": 5}')
    found = rows(there)
    json.dumps(found).encode()
    assert found["records:../y"]["ours"] is False
    run.chmod(0o700)
    remove(there, "runs/r-done", "staging")
    assert not run.exists() and not (there / ".surgvqa/staging/bad").exists()


def test_a_sparse_file_and_a_second_name_take_no_room(there):
    with open(there / "runs/r-done/sparse", "wb") as file:
        file.truncate(1 << 30)
    put(there / "runs/r-done/one", 1 << 20)
    os.link(there / "runs/r-done/one", there / "runs/r-done/two")
    assert rows(there)["run:runs/r-done"]["bytes"] < 2 << 20


def test_a_removal_that_was_killed_is_finished_by_the_next(there):
    put(there / ".surgvqa/removed/1-2/model.safetensors", 100_000)
    assert rows(there)["staging:staging/removed"]["bytes"] >= 100_000
    remove(there, "staging")
    assert not (there / ".surgvqa/removed").exists()


@pytest.mark.parametrize("link", ["removed", "removed/1-2"])
def test_what_lies_behind_a_link_is_not_ours(there, link, tmp_path):
    """The folder of removals, or one in it, may lead anywhere."""
    mine = put(tmp_path / "elsewhere/folder/mine.bin")
    place = there / ".surgvqa" / link
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o755)
    put(there / ".surgvqa/removed/stray") if link != "removed" else None
    for name in ("merged", "r-done", "staging"):
        with contextlib.suppress(SurgvqaError):
            disk.clean(None, str(there), "venv", [name])
    assert mine.exists() and list((tmp_path / "elsewhere").iterdir()) == [mine.parent]
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o755
    assert (there / "merged").exists() == (link == "removed")


@pytest.mark.slow
def test_the_command_lists_asks_and_removes(laptop):  # noqa: F811
    """By ssh, with a job that runs; and an upload names what another one left."""
    stub_train(laptop)
    with laptop.connect() as remote:
        run = start(remote, "--run_name", "long")
    publish(laptop.there, "old", ["config.json"])
    staging(laptop.there, "b" * 40, "third", 209_000)
    until(lambda: json.loads((laptop.there / "runs" / run / "run.json").read_text()).get("options"))
    found = laptop.here("disk", "gpuhost")
    assert {row["name"]: row["in_use"] for row in found["entries"] if row["kind"] == "run"} == {f"runs/{run}": run}
    assert found["free_bytes"] > 0 and found["cleaned"] == []
    said = laptop.command("disk", "gpuhost", "--clean", "old", check=2).stderr
    assert "--yes" in said and (laptop.there / "old").exists()
    said = laptop.command("disk", "gpuhost", "--clean", f"runs/{run}", "--yes", check=1).stderr
    assert f"in use by {run}" in said
    put(laptop.workspace / "ckpt/model.safetensors", 1000)
    uploaded = laptop.command("upload", "gpuhost", "--model_name_or_path", "ckpt")
    assert "third" in uploaded.stdout + uploaded.stderr and "disk gpuhost" in uploaded.stdout + uploaded.stderr
    shown = laptop.command("disk", "gpuhost", "--clean", "old", "staging", "--yes").stdout
    assert "removed: old, staging/bbbbbbbbbbbb" in shown and not (laptop.there / "old").exists()
    assert laptop.here("stop", "gpuhost", run)["state"] == "stopped"
