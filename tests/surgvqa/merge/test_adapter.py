"""What an adapter holds and promises: used as PEFT uses it, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from merge_kit import LORA, Small, differences, edited, load, merged_by_peft, run_merge, trained  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from surgvqa.errors import UsageError  # noqa: E402
from surgvqa.files import read_json  # noqa: E402
from surgvqa.merge import patterns  # noqa: E402
from surgvqa.merge.adapter import KNOWN, REFUSED  # noqa: E402

pytestmark = pytest.mark.model


def test_what_the_base_lacks_is_refused_unless_an_adapter_may_bring_it(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, {**LORA, "modules_to_save": ["audio_projector"]})
    file = adapter / "adapter_model.safetensors"
    lora = load_file(file)
    weights = {name: t for name, t in load(base).items() if name != "audio_projector.bias"}
    save_file(weights, base / "model.safetensors")
    merged = load(run_merge(tmp_path, base, adapter))
    bias = lora["base_model.model.audio_projector.bias"].to(torch.bfloat16)
    assert torch.equal(merged["audio_projector.bias"], bias)
    save_file({**lora, "base_model.model.audio_projector.gain": torch.ones(24)}, file)
    with pytest.raises(UsageError, match=r"audio_projector\.gain: the base .* has no audio_projector\.gain"):
        run_merge(tmp_path, base, adapter, "other")


@pytest.mark.parametrize("module", ["audio_projector", "norm"])
def test_modules_to_save_that_the_file_lacks_are_refused(tmp_path: Path, module: str) -> None:
    base, adapter, _ = trained(tmp_path, {**LORA, "modules_to_save": ["audio_projector", "norm"]})
    file = adapter / "adapter_model.safetensors"
    lora = load_file(file)
    save_file({n: t for n, t in lora.items() if f"{module}." not in n}, file)
    with pytest.raises(UsageError, match=rf"modules_to_save names {module}, but .* has no .*{module}"):
        run_merge(tmp_path, base, adapter)
    save_file({n: t for n, t in lora.items() if not n.endswith(f"{module}.bias")}, file)
    with pytest.raises(UsageError, match=rf"modules_to_save names {module}, but .* has no .*{module}\.bias"):
        run_merge(tmp_path, base, adapter)
    assert not list(tmp_path.glob("merged*"))


def test_a_projector_laid_over_keeps_the_promise_of_modules_to_save(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, {**LORA, "modules_to_save": ["audio_projector"]})
    file = adapter / "adapter_model.safetensors"
    lora = load_file(file)
    save_file({n: t for n, t in lora.items() if "audio_projector" not in n}, file)
    projector = {n.rpartition(".")[2]: t for n, t in lora.items() if "audio_projector" in n}
    torch.save(projector, tmp_path / "audio_projector.pt")
    merged = load(run_merge(tmp_path, base, adapter, projector=str(tmp_path / "audio_projector.pt")))
    assert torch.equal(merged["audio_projector.weight"], projector["weight"].to(torch.bfloat16))


def test_an_adapter_of_another_name_is_understood_and_two_are_refused(tmp_path: Path) -> None:
    base, adapter, theirs = trained(tmp_path, {**LORA, "modules_to_save": ["audio_projector"]})
    file = adapter / "adapter_model.safetensors"
    lora = load_file(file)

    def named(name: str) -> str:
        name = re.sub(r"\.(lora_[AB])\.", r".\1.stage2.", name)
        return name.replace(".audio_projector.", ".audio_projector.modules_to_save.stage2.")

    save_file({named(n): t for n, t in lora.items()}, file)
    assert differences(load(run_merge(tmp_path, base, adapter)), theirs) == []
    first = next(n for n in lora if "lora_A" in n)
    save_file({**{named(n): t for n, t in lora.items()}, first: lora[first].clone()}, file)
    with pytest.raises(UsageError, match=r"two adapters in one file|of different adapters"):
        run_merge(tmp_path, base, adapter, "other")


@pytest.mark.parametrize("target", [["q_proj", "o_proj"], r".*\.(q|o)_proj"])
def test_half_the_layers_missing_is_refused_whatever_target_modules_is(tmp_path: Path, target: Any) -> None:
    base, adapter, _ = trained(tmp_path, {**LORA, "target_modules": target})
    file = adapter / "adapter_model.safetensors"
    lora = load_file(file)
    save_file({n: t for n, t in lora.items() if "layers.1.self_attn.q_proj" not in n}, file)
    with pytest.raises(UsageError, match=r"no LoRA weights for 1 of the 2 modules like .*layers\.1\.self_attn\.q_proj"):
        run_merge(tmp_path, base, adapter)
    save_file({n: t for n, t in lora.items() if "layers.1." not in n}, file)
    edited(adapter, layers_to_transform=[0])
    run_merge(tmp_path, base, adapter)


def test_a_name_of_target_modules_without_weights_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, {**LORA, "target_modules": ["q_proj"]})
    edited(adapter, target_modules=["q_proj", "up_proj"])
    with pytest.raises(UsageError, match="target_modules names up_proj, but there are no LoRA weights for it"):
        run_merge(tmp_path, base, adapter)


def test_fan_in_fan_out_on_linear_layers_is_taken_as_false_as_peft_does(tmp_path: Path) -> None:
    base, adapter, theirs = trained(tmp_path, LORA)
    edited(adapter, fan_in_fan_out=True)
    merged = run_merge(tmp_path, base, adapter)
    assert differences(load(merged), theirs) == []
    assert "fan_in_fan_out" in " ".join(read_json(merged / "merge_report.json")["warnings"])


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_the_base_that_peft_saves_beside_its_lora_is_the_base(
    tmp_path: Path, module: str, tied: bool, base_dtype: torch.dtype
) -> None:
    """Also where it is not Stage 1's own, and finer than Stage 1's dtype: PEFT holds it in that."""
    base, adapter, _ = trained(
        tmp_path, {**LORA, "target_modules": [module, "q_proj"]}, tied=tied, base_dtype=base_dtype
    )
    file = adapter / "adapter_model.safetensors"
    saved = load_file(file)
    (key,) = (name for name in saved if name.endswith("base_layer.weight"))
    saved[key] = torch.randn(saved[key].shape, generator=torch.Generator().manual_seed(7))
    save_file(saved, file)
    model = Small(32, 24, 40, tied).to(base_dtype)
    model.load_state_dict(load(base), strict=not tied)
    theirs = merged_by_peft(model, adapter)
    assert differences(load(run_merge(tmp_path, base, adapter)), theirs) == []


def test_a_base_given_twice_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, {**LORA, "target_modules": ["lm_head", "q_proj"]}, tied=True)
    file = adapter / "adapter_model.safetensors"
    weight = load(base)["model.embed_tokens.weight"].clone()
    save_file({**load_file(file), "base_model.model.model.embed_tokens.base_layer.weight": weight}, file)
    with pytest.raises(UsageError, match=r"both stand for model\.embed_tokens\.weight; which one counts"):
        run_merge(tmp_path, base, adapter)


def test_a_tied_embedding_that_peft_kept_tied_stays_tied(tmp_path: Path) -> None:
    """ensure_weight_tying: PEFT saves the one tensor under both names."""
    base, adapter, _ = trained(tmp_path, {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]}, tied=True)
    edited(adapter, ensure_weight_tying=True)
    file = adapter / "adapter_model.safetensors"
    saved = load_file(file)
    new = saved["base_model.model.model.embed_tokens.weight"]
    save_file({**saved, "base_model.model.lm_head.weight": new.clone()}, file)
    merged = run_merge(tmp_path, base, adapter)
    assert read_json(merged / "config.json")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load(merged)
    assert torch.equal(load(merged)["model.embed_tokens.weight"], new.to(torch.bfloat16))


def test_a_tie_that_stands_in_text_config_is_a_tie(tmp_path: Path) -> None:
    base, adapter, theirs = trained(tmp_path, {**LORA, "modules_to_save": ["lm_head"]}, tied=True)
    (base / "config.json").write_text(json.dumps({"model_type": "x", "text_config": {"tie_word_embeddings": True}}))
    merged = run_merge(tmp_path, base, adapter)
    assert differences(load(merged), theirs) == []
    assert read_json(merged / "config.json")["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "audio_projector"], "modules_to_save": ["audio_projector"]},
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["model.layers.0"]},
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.1.*"},
        {"target_modules": ["q_proj", "no_module_of_this_model"]},
        {"bias": "all", "modules_to_save": ["audio_projector", "norm"]},
        {"target_modules": r".*\.(q|o)_proj", "layers_to_transform": None},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.up_proj"]},
    ],
    ids=str,
)
def test_promises_are_read_as_peft_reads_them(tmp_path: Path, lora: dict[str, Any]) -> None:
    base, adapter, theirs = trained(tmp_path, {**LORA, **lora})
    assert differences(load(run_merge(tmp_path, base, adapter)), theirs) == []


def test_half_the_layers_missing_is_refused_for_all_linear_too(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, {**LORA, "target_modules": "all-linear"})
    file = adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "layers.1.up_proj" not in n}, file)
    with pytest.raises(UsageError, match=r"no LoRA weights for 1 of the 2 modules like model\.layers\.1\.up_proj"):
        run_merge(tmp_path, base, adapter)


def test_a_pattern_may_use_the_names_of_transformers_5(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, LORA)
    file = adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "layers.1.up_proj" not in n}, file)
    edited(adapter, target_modules=r"model\.language_model\.layers\.\d+\..*_proj")
    with pytest.raises(UsageError, match=r"no LoRA weights for 1 of the 2 modules like model\.layers\.1\.up_proj"):
        run_merge(tmp_path, base, adapter)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_the_config_promises(tmp_path: Path, bias: str) -> None:
    """Missing in one layer: refused. Missing everywhere: a warning (PEFT before 0.7 saved none)."""
    base, adapter, _ = trained(tmp_path, {**LORA, "bias": bias})
    file = adapter / "adapter_model.safetensors"
    saved = load_file(file)
    save_file({n: t for n, t in saved.items() if "layers.1.up_proj.base_layer.bias" not in n}, file)
    with pytest.raises(UsageError, match=r"no trained biases for 1 of the 2 modules like model\.layers\.1\.up_proj"):
        run_merge(tmp_path, base, adapter)
    save_file({n: t for n, t in saved.items() if not n.endswith(".bias")}, file)
    warnings = read_json(run_merge(tmp_path, base, adapter) / "merge_report.json")["warnings"]
    assert any(f"bias={bias}, but adapter_model.safetensors has no trained bias for" in text for text in warnings)


def test_many_patterns_are_matched_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rank_pattern may name every module; the first pattern that matches wins."""
    base, adapter, theirs = trained(tmp_path, {**LORA, "rank_pattern": {".*q_proj": 2, "self_attn.*": 3}})
    table = {f"model.layers.0.x{number}": 9 for number in range(2000)}
    edited(adapter, rank_pattern={**table, ".*q_proj": 2, "self_attn.*": 3})
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a) or real(*a, **k))
    assert differences(load(run_merge(tmp_path, base, adapter)), theirs) == []
    assert len(started) <= 3


def test_the_folder_of_a_named_adapter_is_hinted_at(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, LORA)
    adapter.rename(tmp_path / "stage2")
    (tmp_path / "outer").mkdir()
    (tmp_path / "stage2").rename(tmp_path / "outer" / "stage2")
    with pytest.raises(UsageError, match=r"no adapter_config\.json in it; is .*outer/stage2 meant\?"):
        run_merge(tmp_path, base, tmp_path / "outer")


def test_a_stale_quantization_config_does_not_make_plain_weights_quantised(tmp_path: Path) -> None:
    base, adapter, theirs = trained(tmp_path, LORA)
    stale = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (base / "config.json").write_text(json.dumps({**read_json(base / "config.json"), "quantization_config": stale}))
    merged = run_merge(tmp_path, base, adapter)
    assert differences(load(merged), theirs) == [] and "quantization_config" not in read_json(merged / "config.json")
    assert "no tensor is quantised" in " ".join(read_json(merged / "merge_report.json")["warnings"])


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern"])
def test_a_regular_expression_that_never_ends_is_one_line(tmp_path: Path, monkeypatch, key: str) -> None:
    base, adapter, _ = trained(tmp_path, LORA)
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    bomb = r"(([a-z._0-9]+)+)+$X"
    edited(adapter, **{key: {bomb: 4} if key == "rank_pattern" else bomb})
    with pytest.raises(UsageError, match=rf"{key}.* takes more than 1 s to match"):
        run_merge(tmp_path, base, adapter)


def test_integer_factors_are_refused(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, LORA)
    file = adapter / "adapter_model.safetensors"
    save_file({n: t.to(torch.int8) if "q_proj.lora_A" in n else t for n, t in load_file(file).items()}, file)
    with pytest.raises(UsageError, match="is I8, expected a float type"):
        run_merge(tmp_path, base, adapter)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected LORA"),
        ({"use_qalora": True}, "use_qalora: QA-LoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: layer replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changed the base weights"),
        ({"r": 5}, "r=5 but lora_A has 4 rows in model.layers.0.down_proj; is this the adapter's own config?"),
        ({"use_dora": True}, "use_dora=True, but model.layers.0.down_proj has no lora_magnitude_vector"),
        ({"lora_alpha": None}, "lora_alpha=None for model.layers.0.down_proj; expected a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan for"),
        ({"lora_alpha": True}, "lora_alpha=True for"),
        ({"lora_alpha": 10**400}, "lora_alpha is a number of over 300 digits"),
        ({"rank_pattern": {"q_proj": "4"}}, "r='4', lora_alpha=8 for model.layers.0.self_attn.q_proj"),
        ({"use_rslora": "false"}, "use_rslora is 'false', expected true or false"),
        ({"use_dora": 0.0}, "use_dora is 0.0, expected true or false"),
        ({"bias": "lora"}, "bias is 'lora', expected none, all, lora_only"),
        (
            {"target_modules": ["nope"]},
            "target_modules does not match model.layers.0.down_proj and 7 more modules, but",
        ),
        ({"target_modules": []}, "target_modules does not match model.layers.0.down_proj"),
        ({"target_modules": "(a|b)*c"}, "target_modules does not match model.layers.0.down_proj"),
        ({"layers_to_transform": [1]}, "target_modules does not match model.layers.0.down_proj and 3 more modules"),
        ({"exclude_modules": ["q_proj"]}, "target_modules does not match model.layers.0.self_attn.q_proj"),
        ({"rank_pattern": [4]}, "rank_pattern is [4], expected an object of regular expressions and numbers"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern has '(', which is not a regular expression"),
        ({"modules_to_save": "audio_projector"}, "modules_to_save is 'audio_projector', expected a list of names"),
        ({"modules_to_save": [{"a": 1}]}, "expected a list of names"),
        ({"target_modules": 7}, "target_modules is 7, expected a regular expression or a list of names"),
        ({"target_modules": "("}, "target_modules '(', which is not a regular expression"),
        ({"layers_to_transform": True}, "layers_to_transform is True, expected a layer or a list of layers"),
        ({"bias": ["all"]}, "bias is ['all'], expected none, all, lora_only"),
    ],
)
def test_adapters_that_cannot_be_merged(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    base, adapter, _ = trained(tmp_path, LORA)
    edited(adapter, **changes)
    with pytest.raises(UsageError) as caught:
        run_merge(tmp_path, base, adapter)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_tensor_trained_in_full_that_is_no_float_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    base, adapter, _ = trained(tmp_path, {**LORA, "modules_to_save": ["audio_projector"]})
    file = adapter / "adapter_model.safetensors"
    save_file({n: t.to(dtype) if "audio" in n else t for n, t in load_file(file).items()}, file)
    with pytest.raises(UsageError, match=r"audio_projector\.\w+ is (I64|BOOL), expected a float type"):
        run_merge(tmp_path, base, adapter)
    assert not list(tmp_path.glob("merged*"))


def test_every_field_of_pefts_config_is_known_and_others_are_named(tmp_path: Path) -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields == KNOWN | REFUSED.keys()
    base, adapter, theirs = trained(tmp_path, LORA)
    edited(adapter, use_a_new_idea=True, another=None)
    merged = run_merge(tmp_path, base, adapter)
    assert differences(load(merged), theirs) == []
    warned = [text for text in read_json(merged / "merge_report.json")["warnings"] if "unknown to this program" in text]
    assert len(warned) == 1 and "use_a_new_idea" in warned[0] and "another" not in warned[0]


def test_damaged_inputs_are_named(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, LORA)
    file = adapter / "adapter_model.safetensors"
    lora = load_file(file)

    def refused(change: dict[str, torch.Tensor], text: str) -> None:
        save_file(change, file)
        with pytest.raises(UsageError, match=text):
            run_merge(tmp_path, base, adapter)

    name = "base_model.model.model.layers.0.self_attn.q_proj"
    refused(
        {n: t for n, t in lora.items() if n != f"{name}.lora_B.weight"}, "q_proj has no lora_B; is the file complete"
    )
    refused({**lora, f"{name}.lora_C.weight": torch.ones(1)}, "unknown kind of LoRA tensor")
    refused({n.replace("layers.0", "layers.9"): t for n, t in lora.items()}, r"the base .* has no model\.layers\.9")
    refused({**lora, f"{name}.lora_A.weight": torch.ones(4, 23)}, r"a weight of \[24, 23\], the base has \[24, 24\]")
    refused({**lora, f"{name}.lora_A.weight": torch.ones(4)}, r"lora_A\.weight is \[4\], expected two dimensions")
    refused({**lora, f"{name}.lora_B.weight": torch.tensor(1.0)}, r"lora_B\.weight is \[\], expected two dimensions")
    refused({**lora, f"{name}.lora_B.bias": torch.ones(7)}, r"lora_B\.bias is \[7\], expected \[24\]")
    refused({**lora, "base_model.model.lm_head.weight": torch.ones(2, 2)}, r"is \[2, 2\], the base has \[32, 24\]")
    save_file(lora, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors: .*truncated"):
        run_merge(tmp_path, base, adapter)


def test_four_bit_base_is_named(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, LORA)
    weights = load(base)
    name = "model.layers.0.up_proj.weight"
    packed = {f"{name}.absmax": torch.ones(3), f"{name}.quant_state.bitsandbytes__nf4": torch.ones(8).byte()}
    save_file({**weights, **packed}, base / "model.safetensors")
    with pytest.raises(UsageError, match=r"this checkpoint is 4-bit .*; merge onto the BF16 original"):
        run_merge(tmp_path, base, adapter)


def test_lora_bias_without_a_bias_is_refused_as_peft_does(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, {**LORA, "target_modules": ["q_proj"], "lora_bias": True})
    weights = {n: t for n, t in load(base).items() if n != "model.layers.1.self_attn.q_proj.bias"}
    save_file(weights, base / "model.safetensors")
    with pytest.raises(UsageError, match=r"lora_bias, but the base has no model\.layers\.1\.self_attn\.q_proj\.bias"):
        run_merge(tmp_path, base, adapter)


@pytest.mark.parametrize(("promised", "kept"), [(True, "layers.0"), (False, "")])
def test_lora_bias_and_the_file_agree_or_are_refused(tmp_path: Path, promised: bool, kept: str) -> None:
    """Half of the promised biases missing, or biases that the config does not know (PEFT would not load them)."""
    base, adapter, _ = trained(tmp_path, {**LORA, "target_modules": ["q_proj"], "lora_bias": True})
    file, config = adapter / "adapter_model.safetensors", read_json(adapter / "adapter_config.json")
    save_file({n: t for n, t in load(adapter).items() if not n.endswith("lora_B.bias") or kept in n}, file)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": promised}))
    with pytest.raises(UsageError, match=rf"lora_bias={promised}, but .*q_proj has .* lora_B\.bias"):
        run_merge(tmp_path, base, adapter)


def test_a_base_whose_config_lacks_a_size_is_merged_with_a_warning(tmp_path: Path) -> None:
    base, adapter, theirs = trained(tmp_path, LORA)
    config = read_json(base / "config.json")
    (base / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_vl"}))
    merged = run_merge(tmp_path, base, adapter)
    assert differences(load(merged), theirs) == []
    assert "hidden_size is missing" in " ".join(read_json(merged / "merge_report.json")["warnings"])
