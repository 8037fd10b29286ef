"""merge_report.json: its figures and its warnings."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from merge_kit import LORA, load, run_merge, trained  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from surgvqa.config.options import MergeOptions  # noqa: E402
from surgvqa.config.settings import Path_  # noqa: E402
from surgvqa.files import read_json  # noqa: E402
from surgvqa.machine.process import usable_cores  # noqa: E402
from surgvqa.merge import arithmetic, command  # noqa: E402
from surgvqa.runs.folder import Run  # noqa: E402

pytestmark = pytest.mark.model


@pytest.mark.parametrize("ahead", [True, False], ids=["prepared", "not prepared"])
def test_report_figures_are_those_of_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    """Whether or not a worker had the time to prepare the module."""
    prepare, fill = arithmetic.Merged.prepare, arithmetic.Merged.fill

    def prepared(self: arithmetic.Merged, start: int, out: memoryview) -> None:
        prepare(self)
        fill(self, start, out)

    monkeypatch.setattr(arithmetic.Merged, "prepare", lambda _: None)
    if ahead:
        monkeypatch.setattr(arithmetic.Merged, "fill", prepared)
    base, adapter, _ = trained(tmp_path, {**LORA, "lora_alpha": 7}, size=300, inner=600)
    merged = run_merge(tmp_path, base, adapter)
    report = read_json(merged / "merge_report.json")
    weights, lora, result = load(base), load(adapter), load(merged)
    assert report["modules_merged"] == len(report["modules"]) == 8
    losses = []
    for entry in report["modules"]:
        name = entry["module"]
        prefix = f"base_model.model.{name}"
        w = weights[f"{name}.weight"].double()
        delta = lora[f"{prefix}.lora_B.weight"].double() @ lora[f"{prefix}.lora_A.weight"].double() * 7 / 4
        lost = (result[f"{name}.weight"].double() - (w + delta)).norm() / delta.norm()
        assert entry["scale"] == 7 / 4
        assert entry["w_norm"] == pytest.approx(float(w.norm()), rel=1e-5)
        assert entry["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert entry["delta_ratio"] == pytest.approx(float(delta.norm() / w.norm()), rel=1e-5)
        assert entry["rounding_loss"] == pytest.approx(float(lost), rel=0.1)  # measured on one row in eight
        losses.append(float(lost))
    assert report["rounding_loss"] == pytest.approx(sorted(losses)[len(losses) // 2], rel=0.1)
    layer = [e for e in report["modules"] if e["layer"] == 1]
    ratio = math.sqrt(sum(e["delta_norm"] ** 2 for e in layer) / sum(e["w_norm"] ** 2 for e in layer))
    assert report["by_layer"][1]["delta_ratio"] == pytest.approx(ratio)
    assert {row["kind"] for row in report["by_kind"]} == {"q_proj", "o_proj", "up_proj", "down_proj"}
    spent = {row["kind"]: row["seconds"] for row in report["by_kind"]}
    for kind, seconds in spent.items():
        each = [e["seconds"] for e in report["modules"] if e["kind"] == kind]
        assert all(s > 0 for s in each) and seconds == pytest.approx(sum(each))
    assert sum(spent.values()) == pytest.approx(sum(row["seconds"] for row in report["by_layer"]))
    assert sum(spent.values()) <= report["seconds_by_phase"]["merge"] * usable_cores() + 0.01  # its rounding
    assert report["dtypes_before"] == report["dtypes_after"] == {"BF16": len(weights)}
    assert set(report["copied"]) == {
        n for n in weights if not any(f"{e['module']}.weight" == n for e in report["modules"])
    }
    for shard, facts in report["shards"].items():
        assert hashlib.sha256((merged / shard).read_bytes()).hexdigest() == facts["sha256"]


def test_report_names_the_suspicious(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, {**LORA, "modules_to_save": ["audio_projector"]})
    file = adapter / "adapter_model.safetensors"
    lora = load_file(file)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    second = "base_model.model.model.layers.1.up_proj.lora_A.weight"
    lora[first] = torch.zeros_like(lora[first])
    lora[second][0, 0] = math.nan
    lora["base_model.model.audio_projector.weight"] = load(base)["audio_projector.weight"].float()
    save_file(lora, file)
    (adapter / "README.md").write_text("- quant_method: bitsandbytes\n- load_in_4bit: True\n")
    options = MergeOptions(
        stage1_model_path=Path_(base), stage2_adapter_path=Path_(adapter), output_path=Path_(tmp_path / "merged")
    )
    with Run.create(tmp_path / "runs", "merge") as run:
        outcome = command.run(options, run)
    assert not outcome.ok  # a NaN in the output is a bad answer
    text = "\n".join(outcome.data["warnings"])
    assert "model.layers.1.up_proj.weight: contains NaN" in text
    assert "1 of 8 modules have a zero delta" in text and "model.layers.0.self_attn.q_proj" in text
    assert "audio_projector.weight: the adapter's tensor equals the base's" in text
    assert "quantised base" in text
    assert read_json(tmp_path / "merged" / "merge_report.json")["stage2"]["quantised_base"] == "4-bit"
