"""`surgvqa merge --verify`: a right merge is told from a wrong one by its answers."""

import json
import shutil
from pathlib import Path

import pytest

from surgvqa.cli import main
from surgvqa.merge import command
from surgvqa.outcome import Outcome

torch = pytest.importorskip("torch")
import small  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from surgvqa.config.options import LoraOptions, MergeOptions  # noqa: E402
from surgvqa.config.settings import Path_  # noqa: E402
from surgvqa.evaluation import merge  # noqa: E402
from surgvqa.evaluation.same_model import compare  # noqa: E402
from surgvqa.model.adapter import adapter_parameters, add_lora, save_adapter  # noqa: E402
from surgvqa.model.loading import load_model  # noqa: E402
from surgvqa.runs.folder import Run  # noqa: E402

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The small world with an adapter whose LoRA matrices are random."""
    world = small.build(tmp_path_factory.mktemp("small"), samples=4)
    base = load_model(world.checkpoint, dtype=torch.float32, device="cpu", attn_implementation="eager")
    adapter = add_lora(base, LoraOptions(lora_r=4, lora_alpha=8))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, slot in adapter_parameters(adapter).items():
            if "lora_" in name:
                slot.normal_(std=0.1)
    save_adapter(adapter, world.root / "stage2")
    return world


def _merge(world, output: Path, capsys, *more: str) -> tuple[int, dict, str]:
    words = ["merge", "--stage1_model_path", world.checkpoint, "--stage2_adapter_path", world.root / "stage2"]
    words += ["--output_path", output, "--workspace", world.root, "--json", *more]
    code = main.main(list(map(str, words)))
    shown = capsys.readouterr()
    return code, json.loads(shown.out or "{}"), shown.err


def _samples(world) -> list[str]:
    named = {"eval_data_path": world.train, "frames_dir": world.root / "frames", "audio_dir": world.root / "audio"}
    return [word for name, path in named.items() for word in (f"--{name}", str(path))]


def test_a_right_merge_answers_as_the_adapter_does(world, tmp_path, capsys):
    code, data, _ = _merge(world, tmp_path / "merged", capsys, "--verify", "2", *_samples(world))
    found = data["verify"]
    assert code == 0 and found["ok"] and found["samples"] == 2
    assert found["largest_logit_gap"] > 0 and found["gap_share"] < 0.2 and found["unexplained_share"] == 0
    assert found["verdict"].startswith("the same model except for rounding: ")


def test_a_merge_that_left_the_adapter_out_fails(world, tmp_path, capsys, monkeypatch):
    def copied(options, run) -> Outcome:
        shutil.copytree(options.stage1_model_path, options.output_path)
        return Outcome({"output": options.output_path})

    monkeypatch.setattr(command, "run", copied)
    code, data, _ = _merge(world, tmp_path / "merged", capsys, "--verify", "2", *_samples(world))
    found = data["verify"]
    assert code == 1 and not found["ok"] and found["verdict"].startswith("NOT the same model: ")
    assert found["gap_share"] == pytest.approx(1, abs=0.01) and found["unexplained_share"] > 0.9


def test_a_merge_that_left_one_module_out_fails(world, tmp_path, capsys):
    assert _merge(world, tmp_path / "merged", capsys)[0] == 0
    (stage1,), (file,) = world.checkpoint.glob("*.safetensors"), (tmp_path / "merged").glob("*.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**load_file(file), name: load_file(stage1)[name]}, file)
    options = MergeOptions(
        stage1_model_path=Path_(world.checkpoint),
        stage2_adapter_path=Path_(world.root / "stage2"),
        output_path=Path_(tmp_path / "merged"),
        eval_data_path=Path_(world.train),
        frames_dir=Path_(world.root / "frames"),
        audio_dir=Path_(world.root / "audio"),
    )
    with Run.create(tmp_path / "runs", "merge") as run:
        found = compare(merge.evaluation(options, False), merge.evaluation(options, True), 2, run)
    assert not found.ok and 0.01 < found.unexplained_share < 0.9


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--verify needs samples to answer: missing --eval_data_path, --frames_dir, --audio_dir"),
        (["--projector", "PROJECTOR"], "do not include --projector"),
        (["--eval_data_path", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_verify_needs_is_asked_before_the_merge(world, tmp_path, capsys, words, text):
    (tmp_path / "projector.pt").write_bytes(b"")
    words = [str(tmp_path / "projector.pt") if word == "PROJECTOR" else word for word in words]
    given = [*_samples(world), *words] if words else []
    code, _, shown = _merge(world, tmp_path / "merged", capsys, "--verify", "2", *given)
    assert code == 2 and text in shown and not (tmp_path / "merged").exists()
