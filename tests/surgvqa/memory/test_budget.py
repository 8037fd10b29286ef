"""`surgvqa budget` and `surgvqa presets`."""

from __future__ import annotations

import json

import pytest

from surgvqa.cli import main
from surgvqa.machine import gpu
from surgvqa.memory import activations
from surgvqa.model.sizes import Sizes

REAL = Sizes()


def test_budget_says_yes_and_no(capsys):
    assert main.main(["budget", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] is True
    assert document["predicted_peak_gb"] < document["budget_gb"] == 28.5
    allocated = [c["gb"] for c in document["components"] if c["group"] in ("weights", "training", "activations")]
    assert sum(allocated) == pytest.approx(document["predicted_peak_gb"])
    assert document["sequence_tokens"] == 3886
    assert main.main(["budget", "--json", "--budget_gb", "19", "--gradient_checkpointing", "false"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_budget_drawn_fits_80_columns_and_says_what_to_change(capsys):
    assert main.main(["budget", "--gradient_checkpointing", "false", "--budget_gb", "27"]) == 1
    drawn = capsys.readouterr().out
    assert max(map(len, drawn.splitlines())) <= 80
    assert "does not fit" in drawn
    assert "recompute" in drawn
    assert "language model" in drawn
    assert "…" not in drawn
    assert ("on a GPU; this machine has none" in " ".join(drawn.split())) == (not gpu.any_gpu())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--num_frames", "0"],
        ["--budget_gb", "0"],
        ["--image_size", "5"],
        ["--lora_dropout", "1"],
        ["--gradient_accumulation_steps", "0"],
        ["--checkpointed_layers", "-1"],
        ["--checkpointed_layers", "29"],  # the real model has 28
    ],
)
def test_budget_refuses_numbers_that_mean_nothing(arguments, capsys):
    assert main.main(["budget", *arguments]) == 2
    assert arguments[0].strip("-") in capsys.readouterr().err


def test_presets_show_their_peaks(capsys):
    assert main.main(["presets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["presets"]
    peaks = {p["name"]: p["predicted_peak_gb"] for p in listed if p["rung"] is not None}
    spoken = peaks.pop("spoken-8f-512px")  # the later ones are smaller by themselves, with all of the sound
    assert list(peaks.values()) == sorted(peaks.values(), reverse=True) and spoken < peaks["baseline-8f-512px"]
    assert all(p["fits"] for p in listed)


def test_a_preset_with_a_budget_of_its_own_is_held_against_it(tmp_path, capsys):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "first.toml").write_text('reason = "r"\ngives_up = "g"\n[settings]\n')
    small = tmp_path / "presets" / "small.toml"
    small.write_text('reason = "r"\ngives_up = "g"\n[settings]\nbudget_gb = 10.0\n')
    assert main.main(["presets", "--json", "--workspace", str(tmp_path)]) == 0
    fits = {p["name"]: p["fits"] for p in json.loads(capsys.readouterr().out)["presets"]}
    assert not fits.pop("small") and all(fits.values())
    small.write_text('reason = "r"\ngives_up = "g"\n[settings]\nbudget_gb = -1.0\n')
    assert main.main(["presets", "--workspace", str(tmp_path)]) == 2
    assert "budget_gb" in capsys.readouterr().err


def test_a_card_of_24_gb_trains_the_instructions_settings(capsys):
    """In bfloat16, with the driver's part: what needed QLoRA."""
    assert main.main(["budget", "--preset", "card-24gb", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["budget_gb"] == 24.5 and 0 < found["fastest_checkpointed_layers"] < 28


@pytest.mark.model
def test_rows_are_padded_as_the_trainer_pads():
    from surgvqa.training import recipe

    assert recipe.LENGTH_BUCKET == activations.LENGTH_BUCKET
