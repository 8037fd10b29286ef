"""Answers that cannot be lost: written as they come, taken over by --resume, never asked for twice, never mixed up.

The model is the small world's, but most tests answer in its place: with the sample's id, and how often it was asked.
"""

import importlib
import json
import os
import signal
from types import SimpleNamespace

import pytest
import small

from surgvqa.cli.main import main
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.evaluation import command as evaluate
from surgvqa.runs.folder import Run

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.build(tmp_path_factory.mktemp("small"))


@pytest.fixture
def asked(world, monkeypatch):
    """The ids that the model was asked, in order; `asked.stop` is called before each answer."""
    from surgvqa.evaluation import generate

    log = SimpleNamespace(ids=[], stop=lambda count: None)

    def answer_all(answerer, dataset, options, run, keep):
        for sample in dataset.samples:
            log.stop(len(log.ids))
            log.ids.append(sample.id)
            keep(f"{sample.id} said", 5.0)
        return {"batch_size": 1}

    processors = SimpleNamespace(audio_window_s=30)
    monkeypatch.setattr(generate, "load_answerer", lambda options: SimpleNamespace(processors=processors))
    monkeypatch.setattr(generate, "answer_all", answer_all)
    return log


@pytest.fixture
def run_it(world, tmp_path):
    """Evaluates in a workspace of its own; the outcome and the run's folder."""

    def run_it(**changes):
        options = world.evaluate_options(**{"answer_cache": "auto", "eval_data_path": str(world.train), **changes})
        with Run.create(tmp_path / "runs", "evaluate", options={"x": {"value": 1}}) as run:
            return evaluate.run(options, run).data, run.folder

    return run_it


ALL = [f"qa_{n}" for n in range(8)]


def test_a_second_scoring_asks_nothing(asked, run_it):
    first, folder = run_it()
    assert asked.ids == ALL and (first["answered"], first["from_cache"]) == (8, 0)
    assert not list(folder.glob("*.partial*"))
    again, other = run_it()
    assert asked.ids == ALL and (again["answered"], again["from_cache"]) == (0, 8)
    assert (folder / "predictions.jsonl").read_bytes() == (other / "predictions.jsonl").read_bytes()
    run_it(answer_cache="off")
    assert asked.ids == ALL * 2


def test_nothing_of_another_checkpoint_sample_or_setting_is_reused(world, asked, run_it, tmp_path):
    import shutil

    run_it()
    moved = {}
    for name in ("checkpoint", "frames", "audio"):
        moved[name] = tmp_path / name
        shutil.copytree(world.root / name, moved[name])
    asked.ids.clear()
    run_it(**{"checkpoint": str(moved["checkpoint"]), "frames_dir": str(moved["frames"])})
    assert asked.ids == [], "the same contents elsewhere"

    for changes in ({"num_frames": 1}, {"image_size": 56}, {"max_new_tokens": 7}, {"input_mode": "audio_text"}):
        asked.ids.clear()
        run_it(**changes)
        assert asked.ids == ALL, changes
    for file, option, folder in (
        ("v1/v1_0.jpg", "frames_dir", "frames"),
        ("v1/qa_3.wav", "audio_dir", "audio"),
        ("model.safetensors", "checkpoint", "checkpoint"),
    ):
        path = next(moved[folder].glob(file), None) or next(moved[folder].glob("*.safetensors"))
        content, times = bytearray(path.read_bytes()), path.stat()
        content[-1] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if it had never been touched
        asked.ids.clear()
        run_it(**{option: str(moved[folder])})
        assert asked.ids == {"frames": ["qa_0"], "audio": ["qa_3"], "checkpoint": ALL}[folder]


def killed_after(count: int, run_it, asked, **changes) -> None:
    """Runs in a child process that is killed as `count` answers have come."""
    child = os.fork()
    if not child:
        asked.stop = lambda done: os.kill(os.getpid(), signal.SIGKILL) if done == count else None
        run_it(**changes)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def warnings_of(folder) -> str:
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return "\n".join(event["text"] for event in events if event["kind"] == "warning")


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_killed_run_is_gone_on_with(asked, run_it, tmp_path, cache):
    killed_after(5, run_it, asked, answer_cache=cache)
    (folder,) = (tmp_path / "runs").iterdir()
    partial = folder / "predictions.partial.jsonl"
    lines = [json.loads(line) for line in partial.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ALL[:5] and lines[0]["predicted_answer"] == "qa_0 said"
    assert not (folder / "predictions.jsonl").exists()
    with partial.open("ab") as file:
        file.write(b'{"key": "cut o')
    data, finished = run_it(answer_cache=cache, resume=str(folder))
    assert asked.ids == ALL[5:] and (data["answered"], data["from_cache"]) == (3, 5)
    rows = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    assert [row["predicted_answer"] for row in rows] == [f"{name} said" for name in ALL]
    if cache == "off":  # settings that are not those of the killed run
        asked.ids.clear()
        _, changed = run_it(answer_cache=cache, resume=str(folder), image_size=56)
        assert asked.ids == ALL and "left no answer that can be used here" in warnings_of(changed)
        _, again = run_it(answer_cache=cache, resume=str(finished))
        assert "8 of 8 samples are asked again" in warnings_of(again)
    assert not warnings_of(finished)


def test_other_samples_are_not_gone_on_with(asked, run_it, tmp_path, world):
    killed_after(3, run_it, asked)
    (folder,) = (tmp_path / "runs").iterdir()
    rows = world.train.read_text().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(rows[1:]))
    with pytest.raises(UsageError, match=r"sample 0 \(qa_0\), which differs from the given samples"):
        run_it(eval_data_path=str(other), resume=str(folder))


def test_a_line_cut_off_in_the_cache_costs_that_answer_alone(asked, run_it, tmp_path):
    run_it()
    (file,) = (tmp_path / "cache" / "answers").iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    asked.ids.clear()
    run_it()
    assert asked.ids == ["qa_7"]
    run_it()
    assert asked.ids == ["qa_7"], "the line after the one that was cut off is whole"


def test_a_full_disk_ends_the_run(asked, run_it, monkeypatch):
    from surgvqa.evaluation import known

    monkeypatch.setattr(known.os, "write", lambda fd, line: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(SurgvqaError, match=r"predictions\.partial\.jsonl: cannot be written: No space left"):
        run_it()


def test_resume_brings_the_options_of_the_run_along(world, asked, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    os.symlink(world.root, "world")
    data = "--eval_data_path world/train.jsonl --frames_dir world/frames --audio_dir world/audio --checkpoint"
    asked.stop = lambda count: 1 / 0 if count == 4 else None
    assert main(f"evaluate {data} world/checkpoint --num_frames 2 --image_size 84 --device cpu".split()) == 1
    (folder,) = (tmp_path / "runs").iterdir()
    asked.stop = lambda count: None
    monkeypatch.chdir(tmp_path / "runs")
    capfd.readouterr()
    workspace = ["--workspace", str(tmp_path), "--json"]
    assert main(["evaluate", "--resume", folder.name[:15], *workspace]) == 0
    report = json.loads(capfd.readouterr().out)
    assert asked.ids == ALL and report["from_cache"] == 4 and report["samples"] == 8
    written = json.loads((tmp_path / "runs" / report["run"] / "run.json").read_text())
    recorded = written["options"]
    assert {"eval_data_path", "frames", "audio", "checkpoint"} == {*written["inputs"]} and written["versions"]["torch"]
    assert recorded["image_size"] == {"value": 84, "from": f"run {folder.name}"}
    for name, told in (("nothing", "no such run"), (report["run"], "")):
        assert main(["evaluate", "--resume", name, *workspace]) == (2 if told else 0)
        assert told in capfd.readouterr().err
    (folder / "run.json").write_text('{"command": "train", "options": {"a": 1}}')
    assert main(["evaluate", "--resume", folder.name, *workspace]) == 2
    assert "is a train run, expected one of `surgvqa evaluate`" in capfd.readouterr().err


def test_a_real_model_is_asked_once(world, run_it):
    """The whole way: what the cache gives is what the model said."""
    first, folder = run_it(eval_data_path=str(world.eval))
    again, other = run_it(eval_data_path=str(world.eval))
    assert first["answered"] == again["from_cache"] == 4 and "batch_size" not in again
    assert (folder / "predictions.jsonl").read_bytes() == (other / "predictions.jsonl").read_bytes()
    old_way = importlib.import_module("old_way")  # of benchmarks/, which this also keeps working
    options = world.evaluate_options(eval_data_path=str(world.eval))
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert old_way.answer(options)["answers"] == [row["predicted_answer"] for row in rows]
