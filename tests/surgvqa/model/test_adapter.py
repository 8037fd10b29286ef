"""Adapters: what they reach, how they are saved and loaded."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_model import (  # noqa: E402
    close,
    gradients,
    load,
    lora_options,
    sample,
    with_weights,
)

from surgvqa.config.options import LORA_TARGETS  # noqa: E402
from surgvqa.errors import UsageError  # noqa: E402
from surgvqa.model import adapter  # noqa: E402
from surgvqa.model.adapter import add_lora, load_adapter, save_adapter  # noqa: E402

pytestmark = pytest.mark.model


NEW_TARGETS = LORA_TARGETS.replace(r"model\.layers", r"model\.language_model\.layers")


@pytest.mark.parametrize("targets", [LORA_TARGETS, NEW_TARGETS])
def test_the_pattern_may_use_old_or_new_names(checkpoint, targets):
    model = add_lora(load(checkpoint), lora_options(lora_target_modules=targets))
    names = set(adapter.adapter_parameters(model))
    assert len(names) == 2 * 7 * 2 + 1
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in names
    assert "base_model.model.audio_projector.weight" in names


@pytest.mark.parametrize("targets, text", [("model.layer", "matches none"), ("model.(", "not a regular expression")])
def test_a_pattern_that_fits_nothing_is_a_usage_error(model, targets, text):
    with pytest.raises(UsageError, match=text) as error:
        add_lora(model, lora_options(lora_target_modules=targets))
    assert "lora_target_modules" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapters_dtype_is_its_own(checkpoint, dtype):
    model = with_weights(add_lora(load(checkpoint, torch.bfloat16), lora_options(), dtype=dtype)).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    found = gradients(model, sample(1))
    assert all(g.dtype == dtype and g.isfinite().all() for g in found.values())


def test_float32_is_the_default_on_a_bf16_model(checkpoint):
    model = add_lora(load(checkpoint, torch.bfloat16), lora_options())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@torch.no_grad()
def test_save_and_load_give_the_same_model(checkpoint, tmp_path):
    trained = with_weights(add_lora(load(checkpoint), lora_options()))
    trained.get_base_model().audio_projector.weight.mul_(1.5)
    batch = sample(1)
    plain, expected = load(checkpoint)(**batch).logits, trained(**batch).logits
    assert not close(plain, expected, 1e-2)
    save_adapter(trained, tmp_path / "a", {"num_frames": 8})
    again = load_adapter(load(checkpoint), tmp_path / "a")
    assert torch.equal(again(**batch).logits, expected)
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    save_adapter(again, tmp_path / "b")
    first, second = (tmp_path / name / adapter.WEIGHTS for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_what_is_saved_is_in_the_authors_format(checkpoint, tmp_path):
    save_adapter(add_lora(load(checkpoint), lora_options(lora_r=4)), tmp_path, {"num_frames": 8})
    assert sorted(p.name for p in tmp_path.iterdir()) == [adapter.CONFIG, adapter.WEIGHTS, adapter.SETTINGS]
    config = json.loads((tmp_path / adapter.CONFIG).read_text())
    assert config["target_modules"] == LORA_TARGETS and config["modules_to_save"] == ["audio_projector"]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert config["base_model_name_or_path"] == str(checkpoint)
    assert json.loads((tmp_path / adapter.SETTINGS).read_text()) == {"num_frames": 8}
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / adapter.WEIGHTS).items()}
    assert shapes["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"] == (4, 96)
    assert shapes["base_model.model.audio_projector.weight"] == (64, 128)


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"model.layers.0.mlp.up_proj": 2}}]
)
def test_variants_of_lora_load_as_peft_means_them(checkpoint, tmp_path, change):
    """Against PEFT itself, told upstream's names: same tensors, same outputs."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 4, "lora_alpha": 8, "modules_to_save": ["audio_projector"]} | change
    ranks = {name.replace("model.", "language_model."): r for name, r in config.get("rank_pattern", {}).items()}
    told = LoraConfig(target_modules=NEW_TARGETS, **config | {"rank_pattern": ranks})
    theirs = with_weights(get_peft_model(load(checkpoint), told))
    tensors = {name: p.detach().clone() for name, p in adapter.adapter_parameters(theirs).items()}
    save_file(tensors, tmp_path / adapter.WEIGHTS)
    on_disk = {"peft_type": "LORA", "target_modules": LORA_TARGETS} | config
    (tmp_path / adapter.CONFIG).write_text(json.dumps(on_disk))
    ours = load_adapter(load(checkpoint), tmp_path)
    assert close(ours(**sample(1)).logits, theirs(**sample(1)).logits)


def saved_adapter(folder: Path, checkpoint: Path, spoil=None, **config) -> Path:
    save_adapter(with_weights(add_lora(load(checkpoint), lora_options())), folder)
    if spoil:
        tensors = load_file(folder / adapter.WEIGHTS)
        spoil(tensors)
        save_file(tensors, folder / adapter.WEIGHTS)
    file = folder / adapter.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "spoil, config, text",
    [
        (None, {"r": 8}, r"lora_A.weight is \[4, .*\], but .* require \[8, "),
        (lambda t: t.pop(Q), {}, f"no tensor {Q}"),
        (
            lambda t: t.update({Q.replace("layers.0", "layers.9"): torch.zeros(4, 64)}),
            {},
            "layers.9.* is not in the model",
        ),
        (lambda t: t.update({Q: torch.zeros(4, 65)}), {}, r"q_proj.lora_A.weight is \[4, 65\], but .* \[4, 64\]"),
        (
            lambda t: t.update({Q.replace("model.layers", "model.language_model.layers"): t[Q] + 1}),
            {},
            "old and new names",
        ),
        (None, {"target_modules": r"model\.layers\.\d+\.mlp\.up_proj"}, "is not in the model"),
        (None, {"target_modules": r"h\.\d+\.attn"}, "matches none"),
        (None, {"modules_to_save": None}, "audio_projector.weight is not in the model"),
        (None, {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        (None, {"bias": "lora_only"}, "bias is 'lora_only'"),
        (None, {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_a_usage_error_of_one_line(checkpoint, tmp_path, spoil, config, text):
    with pytest.raises(UsageError, match=text) as error:
        load_adapter(load(checkpoint), saved_adapter(tmp_path, checkpoint, spoil, **config))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_no_adapter_and_a_truncated_adapter_are_usage_errors(checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"adapter_config\.json"):
        load_adapter(load(checkpoint), tmp_path / "none")
    folder = saved_adapter(tmp_path / "a", checkpoint)
    whole = (folder / adapter.WEIGHTS).read_bytes()
    (folder / adapter.WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(UsageError, match="not a complete safetensors file"):
        load_adapter(load(checkpoint), folder)


def test_new_names_in_an_adapter_file_load_too(checkpoint, tmp_path):
    def rename(tensors: dict) -> None:
        for name in list(tensors):
            tensors[name.replace("model.model.layers", "model.model.language_model.layers")] = tensors.pop(name)

    folder = saved_adapter(tmp_path, checkpoint, rename, target_modules=NEW_TARGETS)
    assert load_adapter(load(checkpoint), folder) is not None


def test_a_save_that_breaks_off_leaves_the_old_adapter_whole(checkpoint, tmp_path, monkeypatch):
    folder = saved_adapter(tmp_path, checkpoint)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(adapter, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_adapter(add_lora(load(checkpoint), lora_options()), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
