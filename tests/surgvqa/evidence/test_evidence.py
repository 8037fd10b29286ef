"""Evidence: packed from run folders, checked again, its card, and what goes to the hub."""

import csv
import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

hub = pytest.importorskip("huggingface_hub")

from hub_uploads import UploadHub  # noqa: E402

from surgvqa.cli.main import main  # noqa: E402
from surgvqa.evaluation.score import read_predictions, score  # noqa: E402
from surgvqa.evidence import publish  # noqa: E402
from surgvqa.provenance import record  # noqa: E402
from surgvqa.provenance.hashes import Hashes  # noqa: E402

TRAIN, EVALUATE, PROBE = (f"20260101-00000{n}-{name}-abc" for n, name in enumerate(("train", "evaluate", "probe")))


def rows(count: int) -> list[dict]:
    return [
        {"id": f"qa_{n}", "video_id": "v", "frames": [f"v_{100 * n}"], "question": "Any?", "question_type": "a|b",
         "answer": f"It is {label}.", "short_answer": label}
        for n in range(count) for label in ("yes" if n % 3 else "no",)
    ]  # fmt: skip


def jsonl(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def run_folder(root: Path, run: str, options: dict, result: dict, events: list[dict]) -> Path:
    folder = root / "runs" / run
    folder.mkdir(parents=True)
    about = {**record.surroundings(), "inputs": record.hash_inputs(options, Hashes())}
    info = {"id": run, "command": run.split("-")[2], "argv": ["x", "--a b"], "cwd": str(root), "started": 1.0,
            "options": {k: {"value": v, "from": "command line"} for k, v in options.items()}, **about}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(info))
    ended = {"t": 9.0, "kind": "finished", "state": "finished", "exit_code": 0, "result": result}
    jsonl(folder / "events.jsonl", [*events, ended])
    return folder


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A training, an evaluation of its adapter and a probe, as their jobs leave them."""
    monkeypatch.chdir(tmp_path)
    training, evaluation = jsonl(tmp_path / "train.jsonl", rows(3)), jsonl(tmp_path / "eval.jsonl", rows(6))
    for folder, names in (
        ("frames/v", [f"v_{100 * n}.jpg" for n in range(6)]),
        ("audio", [f"qa_{n}.wav" for n in range(6)]),
    ):
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / folder / name).write_text(name)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path), "r": 4}))
    (adapter / "train.jsonl").write_text("data that must stay here")
    media = {"frames_dir": str(tmp_path / "frames"), "audio_dir": str(tmp_path / "audio")}
    busy = [{"t": 2.0 + share, "kind": "gpu", "utilization_percent": share} for share in (50, 90)]
    events = [{"t": 1.0, "kind": "metric", "step": 1, "loss": 2.5}, *busy]
    run_folder(tmp_path, TRAIN, {"train_data_path": training, "output_dir": str(adapter), **media}, {}, events)
    options = {"eval_data_path": evaluation, "checkpoint": str(adapter), **media}
    folder = run_folder(tmp_path, EVALUATE, options, {}, [])
    jsonl(folder / "predictions.jsonl", [
        {"question_id": r["id"], "video_id": "v", "question": "Any?", "question_type": r["question_type"],
         "short_answer": r["short_answer"], "predicted_answer": "Yes."} for r in rows(6)])  # fmt: skip
    run_folder(tmp_path, PROBE, {}, {"conclusion": ["sound: deaf: <b>no</b> answer"]}, [])
    return tmp_path


@pytest.fixture
def packed(workspace, capsys):
    assert main(["evidence", TRAIN, EVALUATE, PROBE, "--json"]) == 0
    return SimpleNamespace(root=workspace, folder=workspace / "evidence", data=json.loads(capsys.readouterr().out))


def checked(capsys) -> tuple[int, dict[str, str]]:
    code = main(["evidence", "--check", "evidence", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    return code, {row["what"]: row["state"] for row in report["checks"] if row["state"] != "same"}


# --- packing ----------------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_a_result_needs_and_no_data(packed):
    files = {str(p.relative_to(packed.folder)) for p in packed.folder.rglob("*") if p.is_file()}
    assert {"README.md", "evidence.json", "scores.json", f"runs/{EVALUATE}/predictions.jsonl"} <= files
    assert not [name for name in files if name.endswith(("train.jsonl", "eval.jsonl", ".jpg", ".wav", "log.txt"))]
    subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"], cwd=packed.folder, check=True)
    scores = json.loads((packed.folder / "scores.json").read_text())[EVALUATE]
    clusters = list(range(6))  # 100 frame numbers apart
    expected = score(read_predictions(packed.root / "runs" / EVALUATE / "predictions.jsonl"), clusters=clusters)
    assert scores["keyword_interval"] == pytest.approx(expected["keyword_interval"]) and scores["clusters"] == 6
    assert scores["train_majority_accuracy"] == pytest.approx(4 / 6) == scores["majority_accuracy"]
    manifest = json.loads((packed.folder / "evidence.json").read_text())
    train, evaluate, _ = manifest["runs"]
    assert train["outputs"]["weights"]["sha256"] == evaluate["inputs"]["checkpoint"]["sha256"]
    assert train["shell"] == "surgvqa x '--a b'" and train["versions"]["python"]
    assert json.loads((packed.folder / f"runs/{TRAIN}/utilisation.json").read_text())["utilization_percent"] == {
        "max": 90, "mean": 70.0
    }  # fmt: skip
    (curve,) = csv.DictReader((packed.folder / f"runs/{TRAIN}/curves.csv").open())
    assert (curve["step"], curve["loss"], curve["eval_loss"]) == ("1", "2.5", "")


def test_the_card_states_intervals_and_majorities_in_the_hubs_format(packed):
    card = hub.ModelCard.load(packed.folder / "README.md")
    metrics = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert metrics["keyword accuracy"] == pytest.approx(4 / 6, abs=1e-6) and card.data.library_name == "peft"
    low, high = packed.data["scores"][EVALUATE]["keyword_interval"]
    both = f"66.7 | {100 * low:.1f} to {100 * high:.1f}"
    assert f"| keyword | {both} | {both} |" in card.text
    assert "| always the training's most frequent label | 66.7 |" in card.text and "in 6 clusters" in card.text
    assert "&lt;b&gt;" in card.text and "<b>" not in card.text and "a\\|b" in card.text
    weights = packed.root / "adapter"
    assert Hashes().of_weights(weights) in card.text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "takes runs"),
        (["nothing"], "no such run"),
        ([TRAIN, "--check", "evidence"], "leave the runs out"),
        ([TRAIN, "--output", "adapter"], "already exists"),
        ([TRAIN, "--output", "no/where"], "no such folder"),
        (["--check", "adapter"], "no SHA256SUMS"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(workspace, capsys, words, told):
    before = sorted(workspace.rglob("*"))
    assert main(["evidence", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and sorted(workspace.rglob("*")) == before


# --- checking ---------------------------------------------------------------------------------------------------------


def test_what_holds_is_green_and_each_change_is_found(packed, capsys):
    assert checked(capsys) == (0, {})
    for file, what in (
        ("frames/v/v_100.jpg", f"{EVALUATE}: frames"),
        ("audio/qa_5.wav", f"{EVALUATE}: audio"),
        ("eval.jsonl", f"{EVALUATE}: eval_data_path"),
        ("adapter/adapter_model.safetensors", f"{TRAIN}: weights"),
    ):
        path = packed.root / file
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        code, found = checked(capsys)
        assert code == 1 and found[what] == "changed", file
        path.write_bytes(content)
    (packed.root / "frames/v/v_0.jpg").unlink()
    code, found = checked(capsys)
    assert code == 1 and found[f"{EVALUATE}: frames"] == "changed"
    shutil.rmtree(packed.root / "frames")
    code, found = checked(capsys)
    assert code == 0 and set(found.values()) == {"not here"}
    assert main(["evidence", "--check", "evidence"]) == 0
    assert "are not on this machine" in capsys.readouterr().out


def test_a_forged_folder_is_found(packed, capsys):
    predictions = packed.folder / f"runs/{EVALUATE}/predictions.jsonl"
    predictions.write_text(predictions.read_text().replace('"no"', '"yes"'))
    name = str(predictions.relative_to(packed.folder))
    code, found = checked(capsys)
    assert code == 1 and found == {name: "changed", f"scores of {EVALUATE}": "changed"}
    sums = packed.folder / "SHA256SUMS"  # forged as well: the scores still do not follow from the predictions
    old = next(line for line in sums.read_text().splitlines() if line.endswith(name)).split()[0]
    sums.write_text(sums.read_text().replace(old, hashlib.sha256(predictions.read_bytes()).hexdigest()))
    assert checked(capsys) == (1, {f"scores of {EVALUATE}": "changed"})
    (packed.folder / "extra.txt").write_text("")
    (packed.folder / "clusters.json").unlink()
    code, found = checked(capsys)
    assert found["extra.txt"] == "added" and found["clusters.json"] == "missing" and found["scores"] == "unreadable"
    sums.write_text("0" * 64 + "  ../../etc/passwd\n")
    assert main(["evidence", "--check", "evidence"]) == 2
    assert "SHA256SUMS:1: expected a sha256" in capsys.readouterr().err


def test_a_run_of_old_is_packed_with_what_it_has(workspace, capsys):
    file = workspace / "runs" / EVALUATE / "run.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in info.items() if k not in ("inputs", "versions", "gpus", "git")}))
    (workspace / "eval.jsonl").unlink()
    assert main(["evidence", EVALUATE]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "its inputs were not hashed" in shown and "the intervals are not clustered" in shown
    assert "majority is unknown" in shown
    assert checked(capsys) == (0, {})


def test_a_fetched_run_has_its_weights_with_it(workspace, capsys):
    """Its paths are those of the host; what stands in for its evaluation's file is named."""
    for run, name in ((TRAIN, "output_dir"), (EVALUATE, "eval_data_path")):
        file = workspace / "runs" / run / "run.json"
        info = json.loads(file.read_text())
        info["options"][name]["value"] = "/far/away"
        info["inputs"].get(name, {})["path"] = "/far/away"
        file.write_text(json.dumps(info))
    (workspace / "adapter").rename(workspace / "runs" / TRAIN / "checkpoints")
    assert main(["evidence", TRAIN, EVALUATE, "--eval_data_path", "eval.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"][EVALUATE]["clusters"] == 6
    train = json.loads((workspace / "evidence" / "evidence.json").read_text())["runs"][0]
    assert train["outputs"]["weights"]["path"] == str(workspace / "runs" / TRAIN / "checkpoints")
    code, found = checked(capsys)
    assert code == 0 and set(found.values()) == {"not here"}


# --- publishing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    server = UploadHub()
    monkeypatch.setattr(hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.close()


def test_weights_and_card_are_sent_and_nothing_else(packed, server, capsys):
    command = ["publish", TRAIN, "--repo", "someone/model"]
    assert main(command) == 2, "nobody can be asked"
    told = capsys.readouterr().err
    assert "use --yes" in told and "adapter_model.safetensors" in told and server.asked == []
    assert main([*command, "--yes", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sent"] and report["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert set(server.files) == set(report["files"]) and server.private is True
    assert server.files["adapter_model.safetensors"] == b"weights" * 1000
    assert server.files["README.md"] == (packed.folder / "README.md").read_bytes()
    assert json.loads(server.files["adapter_config.json"]) == {"base_model_name_or_path": packed.root.name, "r": 4}
    assert "hf_test" not in capsys.readouterr().out


def test_it_asks_once_and_no_means_no(packed, server, capsys, monkeypatch):
    asked = SimpleNamespace(isatty=lambda: True, readline=lambda: next(answers))
    monkeypatch.setattr(publish.sys, "stdin", asked)
    command = ["publish", "adapter", "--repo", "someone/model", "--public", "--base_model", "someone/base"]
    answers = iter(["\n"])
    assert main(command) == 1 and server.asked == []
    assert "nothing was sent" in capsys.readouterr().out
    answers = iter(["y\n"])
    assert main(command) == 0 and next(answers, None) is None
    assert json.loads(server.files["adapter_config.json"])["base_model_name_or_path"] == "someone/base"
    assert hub.ModelCard(server.files["README.md"].decode()).data.base_model == "someone/base"
    assert server.private is False and capsys.readouterr().err.count("[y/N]") == 1


def test_what_is_not_to_be_published_is_refused(packed, server, capsys):
    server.refuse = True
    assert main(["publish", "adapter", "--repo", "someone/model", "--yes"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the hub refused it" in line and "403" in line and "hf_test" not in line
    for words, told in (
        (["adapter", "--repo", "model"], "expected USER/NAME"),
        (["adapter", "--repo", "a/b", "--evidence", "none"], "has no README.md"),
        (["runs", "--repo", "a/b", "--yes"], "expected an adapter or a checkpoint"),
    ):
        assert main(["publish", *words]) == 2
        assert told in capsys.readouterr().err
    (packed.root / "adapter" / "adapter_model.safetensors").write_bytes(b"others")
    assert main(["publish", "adapter", "--repo", "a/b", "--yes"]) == 2
    assert "describes other weights" in capsys.readouterr().err
