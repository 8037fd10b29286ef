"""The merge against PEFT's own, bit by bit, and against the oracle."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

from surgvqa.checkpoint.audit import audit  # noqa: E402
from surgvqa.checkpoint.folder import open_checkpoint  # noqa: E402
from surgvqa.checkpoint.headers import header_bytes  # noqa: E402
from surgvqa.config.options import MergeOptions  # noqa: E402
from surgvqa.config.settings import Path_  # noqa: E402
from surgvqa.errors import SurgvqaError, UsageError  # noqa: E402
from surgvqa.files import read_json  # noqa: E402
from surgvqa.machine.process import usable_cores  # noqa: E402
from surgvqa.merge import arithmetic, command, patterns, plan  # noqa: E402
from surgvqa.runs.folder import Run  # noqa: E402

pytestmark = pytest.mark.model


def run_merge(tmp: Path, base: Path, adapter: Path, output: str = "merged", **options: Any) -> Path:
    """Runs the merge as the command does; returns the output folder."""
    given_ = MergeOptions(
        stage1_model_path=Path_(base),
        stage2_adapter_path=Path_(adapter),
        output_path=Path_(tmp / output),
        **{"device": "cpu", **options},
    )
    command.check(given_)
    with Run.create(tmp / "runs", "merge") as run:
        command.run(given_, run)
    return tmp / output


def load(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Names that only one side has, or whose bits are not the same."""
    assert all(t.dtype == torch.bfloat16 for t in ours.values())
    return [
        n
        for n in sorted(ours.keys() | theirs.keys())
        if n not in ours or n not in theirs or not torch.equal(ours[n].view(torch.int16), theirs[n].view(torch.int16))
    ]


class Attention(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.q_proj = nn.Linear(size, size)
        self.o_proj = nn.Linear(size, size, bias=False)


class Layer(nn.Module):
    def __init__(self, size: int, inner: int):
        super().__init__()
        self.self_attn = Attention(size)
        self.up_proj = nn.Linear(size, inner)
        self.down_proj = nn.Linear(inner, size)


class Backbone(nn.Module):
    def __init__(self, tokens: int, size: int, inner: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(tokens, size)
        self.layers = nn.ModuleList(Layer(size, inner) for _ in range(2))
        self.norm = nn.LayerNorm(size)


class Small(nn.Module):
    """A model whose names are the checkpoint's; PEFT needs no more than modules."""

    def __init__(self, tokens: int, size: int, inner: int, tied: bool):
        super().__init__()
        self.config = {"model_type": "small", "tie_word_embeddings": tied}
        self.model = Backbone(tokens, size, inner)
        self.audio_projector = nn.Linear(size, size)
        self.lm_head = nn.Linear(size, tokens, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight


def randomise(parameters: Any, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data.copy_(torch.randn(p.shape, generator=generator) * scale)


def trained(
    tmp: Path, lora: dict[str, Any], *, base_dtype=torch.bfloat16, adapter_dtype=torch.float32, tied=False, size=24,
    inner=40, tokens=32, seed=0, shards=1,
):  # fmt: skip
    """A base on disk, an adapter "trained" on it on disk, and what PEFT makes of the two, as bf16 tensors."""
    model = Small(tokens, size, inner, tied).to(base_dtype)
    randomise(model.parameters(), seed, 0.1)
    base = tmp / "base"
    base.mkdir()
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    names = list(tensors)
    if shards == 1:
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for k in range(shards):
            file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
            save_file({n: tensors[n] for n in names[k::shards]}, base / file, {"format": "pt"})
            weight_map |= dict.fromkeys(names[k::shards], file)
        (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base / "config.json").write_text(json.dumps(model.config))

    wrapped = peft.get_peft_model(model, peft.LoraConfig(**lora))
    randomise((p for p in wrapped.parameters() if p.requires_grad), seed + 1, 0.2)
    wrapped.save_pretrained(tmp / "adapter")
    file = tmp / "adapter" / "adapter_model.safetensors"
    saved = load_file(file)
    save_file({n: t.to(adapter_dtype).contiguous() for n, t in saved.items()}, file, {"format": "pt"})

    fresh = Small(tokens, size, inner, tied).to(base_dtype)
    fresh.load_state_dict(tensors, strict=not tied)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp / "adapter")
    done = loaded.merge_and_unload().to(torch.bfloat16)
    theirs = {n: t.detach().clone() for n, t in done.state_dict().items()}
    if tied and done.lm_head.weight is done.model.embed_tokens.weight:
        del theirs["lm_head.weight"]
    return base, tmp / "adapter", theirs


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "odd scale": ({"lora_alpha": 7, "r": 3}, {}),
    "rank 1": ({"r": 1}, {}),
    "rslora": ({"use_rslora": True, "r": 6}, {}),
    "rank_pattern and alpha_pattern": (
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "up_proj": 5}, "alpha_pattern": {".*down_proj": 3}},
        {},
    ),
    "lora_bias": ({"lora_bias": True, "target_modules": ["q_proj", "up_proj", "down_proj"]}, {}),
    "bias lora_only": ({"bias": "lora_only"}, {}),
    "bias all": ({"bias": "all"}, {}),
    "lora_bias and bias all": (
        {"bias": "all", "lora_bias": True, "target_modules": ["q_proj", "up_proj", "down_proj"]},
        {},
    ),
    "modules_to_save with bias": ({"modules_to_save": ["audio_projector"]}, {}),
    "modules_to_save norm": ({"modules_to_save": ["audio_projector", "norm"]}, {}),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "embedding, fp16 base": ({"target_modules": ["embed_tokens"]}, {"base_dtype": torch.float16}),
    "lm_head": ({"target_modules": ["lm_head", "q_proj"]}, {}),
    "tied, embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, {"tied": True}),
    "tied, untouched": ({}, {"tied": True}),
    "tied, lm_head saved": ({"modules_to_save": ["lm_head"]}, {"tied": True}),
    "tied, embedding saved": ({"modules_to_save": ["embed_tokens"]}, {"tied": True}),
    "fan_in_fan_out": ({"fan_in_fan_out": True, "target_modules": ["o_proj", "q_proj"]}, {}),
    "fp16 base": ({"modules_to_save": ["audio_projector"]}, {"base_dtype": torch.float16}),
    "fp32 base": ({"modules_to_save": ["audio_projector"]}, {"base_dtype": torch.float32}),
    "fp16 base, lora_bias": (
        {"lora_bias": True, "target_modules": ["q_proj", "up_proj"]},
        {"base_dtype": torch.float16},
    ),
    "bf16 adapter": ({"modules_to_save": ["audio_projector"]}, {"adapter_dtype": torch.bfloat16}),
    "fp16 adapter": ({}, {"adapter_dtype": torch.float16}),
    "dora": ({"use_dora": True}, {}),
    "dora, embedding": ({"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}, {}),
    "dora, fp16 base": ({"use_dora": True}, {"base_dtype": torch.float16}),
    "many shards": ({}, {"shards": 5}),
    "large enough for tiles": ({"r": 16}, {"size": 640, "inner": 1300}),
    "large, dora": ({"r": 16, "use_dora": True}, {"size": 640, "inner": 1300}),
    "large, fan_in_fan_out": ({"r": 16, "fan_in_fan_out": True, "target_modules": ["o_proj"]}, {"size": 700}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_bits_are_pefts(tmp_path: Path, case: str) -> None:
    lora, options = CASES[case]
    base, adapter, theirs = trained(tmp_path, {**LORA, **lora}, **options)
    merged = run_merge(tmp_path, base, adapter)
    assert differences(load(merged), theirs) == []


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lora=st.fixed_dictionaries(
        {
            "r": st.integers(1, 24),
            "lora_alpha": st.integers(1, 64),
            "use_rslora": st.booleans(),
            "bias": st.sampled_from(["none", "lora_only", "all"]),
            "target_modules": st.lists(
                st.sampled_from(["q_proj", "o_proj", "up_proj", "down_proj", "lm_head"]), min_size=1, unique=True
            ),
            "modules_to_save": st.sampled_from([None, ["audio_projector"], ["norm", "audio_projector"]]),
            "rank_pattern": st.sampled_from([{}, {"q_proj": 7}, {"layers.1.up_proj": 2, "down_proj": 9}]),
            "alpha_pattern": st.sampled_from([{}, {"o_proj": 5}]),
        }
    ),
    base_dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    adapter_dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    size=st.integers(4, 90),
    inner=st.integers(4, 90),
    shards=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_bits_are_pefts_for_random_adapters(tmp_path_factory, lora, **options) -> None:
    folder = tmp_path_factory.mktemp("random")
    try:
        base, adapter, theirs = trained(folder, lora, **options)
        assert differences(load(run_merge(folder, base, adapter)), theirs) == []
    finally:
        shutil.rmtree(folder)


def test_oracle_is_reproduced(tmp_path: Path, oracle: Path) -> None:
    merged = run_merge(tmp_path, oracle / "stage1", oracle / "stage2_adapter", max_shard_size="8MB")
    assert differences(load(merged), load(oracle / "merged")) == []
    assert audit(open_checkpoint(merged))["ok"]
    carried = {f.name for f in (oracle / "stage1").iterdir() if f.suffix != ".safetensors"}
    assert carried <= {f.name for f in merged.iterdir()}
    assert (merged / "tokenizer.json").read_bytes() == (oracle / "stage1" / "tokenizer.json").read_bytes()


def test_config_is_the_old_forks_and_holds_whispers_sizes(tmp_path: Path, oracle: Path) -> None:
    merged = run_merge(tmp_path, oracle / "stage1", oracle / "stage2_adapter")
    before, after = read_json(oracle / "stage1" / "config.json"), read_json(merged / "config.json")
    assert after.pop("audio_encoder_config") == {
        "model_type": "whisper", "d_model": 1280, "encoder_layers": 1, "encoder_attention_heads": 20,
        "encoder_ffn_dim": 256, "num_mel_bins": 128, "max_source_positions": 1500,
    }  # fmt: skip
    assert after == before  # flat, every old key as it was
    from transformers import AutoConfig

    upstream = AutoConfig.from_pretrained(merged)
    assert upstream.model_type == "qwen2_vl"
    assert upstream.get_text_config().num_hidden_layers == before["num_hidden_layers"]


def test_new_key_names_are_accepted(tmp_path: Path, oracle: Path) -> None:
    """A base and an adapter saved by transformers 5 merge to the same tensors under the old names."""

    def new(name: str) -> str:
        if name.startswith("model."):
            return "model.language_model." + name[len("model.") :]
        return "model." + name if name.startswith(("visual.", "audio_")) else name

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_file({new(n): t for n, t in load(oracle / "stage1").items()}, base / "model.safetensors", {"format": "pt"})
    flat = read_json(oracle / "stage1" / "config.json")
    inner = {k: flat.pop(k) for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    inner |= {k: flat.pop(k) for k in ("num_key_value_heads", "vocab_size")}
    inner["rope_parameters"] = {"rope_theta": flat.pop("rope_theta"), **flat.pop("rope_scaling")}
    inner["dtype"] = flat.pop("torch_dtype")
    (base / "config.json").write_text(json.dumps({**flat, "text_config": inner}))
    prefix = "base_model.model."
    lora = load(oracle / "stage2_adapter").items()
    save_file({prefix + new(n.removeprefix(prefix)): t for n, t in lora}, adapter / "adapter_model.safetensors")
    shutil.copy(oracle / "stage2_adapter" / "adapter_config.json", adapter)
    merged = run_merge(tmp_path, base, adapter)
    assert differences(load(merged), load(oracle / "merged")) == []
    config = read_json(merged / "config.json")
    config.pop("audio_encoder_config")
    assert config == read_json(oracle / "stage1" / "config.json")


def test_projector_is_laid_over_the_base_and_the_adapters_wins(tmp_path: Path) -> None:
    base, adapter, theirs = trained(tmp_path, LORA)
    projector = {"weight": torch.randn(24, 24), "bias": torch.randn(24)}
    for number, document in enumerate(
        (projector, {f"audio_projector.{n}": t for n, t in projector.items()}, {"state_dict": projector})
    ):
        torch.save(document, tmp_path / "audio_projector.pt")
        out = run_merge(tmp_path, base, adapter, f"merged{number}", projector=Path_(tmp_path / "audio_projector.pt"))
        wanted = {**theirs, **{f"audio_projector.{n}": t.to(torch.bfloat16) for n, t in projector.items()}}
        assert differences(load(out), wanted) == []

    saved = tmp_path / "saved"
    saved.mkdir()
    base, adapter, theirs = trained(saved, {**LORA, "modules_to_save": ["audio_projector"]})
    out = run_merge(saved, base, adapter, projector=Path_(tmp_path / "audio_projector.pt"))
    assert differences(load(out), theirs) == []


def test_bin_adapter_merges_and_a_pickle_is_refused(tmp_path: Path) -> None:
    base, adapter, theirs = trained(tmp_path, {**LORA, "modules_to_save": ["audio_projector"]})
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    assert differences(load(run_merge(tmp_path, base, adapter)), theirs) == []

    class Evil:
        def __reduce__(self):
            return print, ("run from a pickle",)

    torch.save({"x": Evil()}, adapter / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"adapter_model\.bin: cannot be loaded as plain weights"):
        run_merge(tmp_path, base, adapter, "other")


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


@pytest.mark.parametrize("tied", [False, True])
def test_the_base_that_peft_saves_beside_a_lora_of_the_head_is_the_base(tmp_path: Path, tied: bool) -> None:
    lora = {**LORA, "target_modules": ["lm_head", "q_proj"]}
    base, adapter, theirs = trained(tmp_path, lora, tied=tied)
    file = adapter / "adapter_model.safetensors"
    head = load(base)["model.embed_tokens.weight" if tied else "lm_head.weight"]
    save_file({**load_file(file), "base_model.model.lm_head.base_layer.weight": head.clone()}, file)
    assert differences(load(run_merge(tmp_path, base, adapter)), theirs) == []


def test_a_stale_quantization_config_does_not_make_plain_weights_quantised(tmp_path: Path) -> None:
    base, adapter, theirs = trained(tmp_path, LORA)
    stale = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (base / "config.json").write_text(json.dumps({**read_json(base / "config.json"), "quantization_config": stale}))
    merged = run_merge(tmp_path, base, adapter)
    assert differences(load(merged), theirs) == [] and "quantization_config" not in read_json(merged / "config.json")
    assert "the tensors count" in " ".join(read_json(merged / "merge_report.json")["warnings"])


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


def test_untied_when_only_one_side_was_trained(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, {**LORA, "modules_to_save": ["lm_head"]}, tied=True)
    merged = run_merge(tmp_path, base, adapter)
    assert read_json(merged / "config.json")["tie_word_embeddings"] is False
    assert "untied" in " ".join(read_json(merged / "merge_report.json")["warnings"])


# --- product and sum in one call -------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_call", [None, False])
def test_one_call_to_blas_gives_the_bits_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_call: bool | None
) -> None:
    """Over several tiles and blocks; whatever this machine's BLAS allows, and the two steps."""
    if one_call is False:
        monkeypatch.setattr(arithmetic, "adds_last", lambda *_: False)
    monkeypatch.setattr("surgvqa.checkpoint.shards.BLOCK_BYTES", 100_000)
    monkeypatch.setattr(arithmetic, "TILE_ROWS", 64)
    monkeypatch.setattr(arithmetic, "TILE_NUMEL", 64 * 200)
    base, adapter, theirs = trained(tmp_path, {**LORA, "r": 16}, size=300, inner=600)
    assert differences(load(run_merge(tmp_path, base, adapter)), theirs) == []


def test_a_blas_that_adds_in_another_order_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_w_on(w: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        for k in range(a.shape[0]):
            w += b[:, k : k + 1] * a[k]
        return w

    tried = arithmetic.adds_last.__wrapped__  # not the cached one
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda w, b, a: w.add_(b @ a))
    assert tried(64, 16, 200)
    monkeypatch.setattr(torch.Tensor, "addmm_", from_w_on)
    assert not tried(64, 16, 200)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["lora", "odd scale", "fp16 base", "embedding", "fan_in_fan_out", "dora"])
def test_the_gpus_way_gives_the_bits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Its steps (whole blocks, two calls, a result beside W), run on the CPU."""
    begin = arithmetic.Merged.__init__

    def as_on_gpu(self: arithmetic.Merged, *arguments: Any) -> None:
        begin(self, *arguments)
        self.on_gpu = True

    monkeypatch.setattr(arithmetic.Merged, "__init__", as_on_gpu)
    lora, options = CASES[case]
    base, adapter, theirs = trained(tmp_path, {**LORA, **lora}, **options)
    assert differences(load(run_merge(tmp_path, base, adapter)), theirs) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_differs_by_its_roundings_at_most(tmp_path: Path) -> None:
    base, adapter, theirs = trained(tmp_path, {**LORA, "r": 16}, size=640, inner=1300)
    torch.set_float32_matmul_precision("high")  # what a training before it may have left: TF32
    try:
        ours = load(run_merge(tmp_path, base, adapter, device="cuda"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    for name, tensor in theirs.items():
        # float32 sums of 16 products in another order, then one rounding to 8 bits: a few elements, one step
        torch.testing.assert_close(ours[name].float(), tensor.float(), rtol=2**-7, atol=1e-6)
        assert (ours[name] != tensor).float().mean() < 1e-3


# --- memory ----------------------------------------------------------------------------------------------------------

WIDE = (18944, 3584)
MEMORY = """
import re, sys
sys.path.insert(0, {root!r})
import torch
from pathlib import Path
from surgvqa.checkpoint import writer
from surgvqa.merge import command as merge
from surgvqa.config.options import MergeOptions, Path_
from surgvqa.runs.folder import Run
def resident(which):
    return int(re.search(which + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
writer.usable_cores = lambda: 16
before = resident("VmRSS")
base, adapter, output = (Path_(p) for p in {folders!r})
options = MergeOptions(stage1_model_path=base, stage2_adapter_path=adapter, output_path=output, max_shard_size="200MB")
with Run.create(Path(output).parent / "runs", "merge") as run:
    merge.run(options, run)
print(before, resident("VmHWM"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_cores(tmp_path: Path) -> None:
    """The real model's widest matrices, 543 MB of them, pretending 16 cores: 150 MB beyond the imports."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    shapes = {
        f"model.layers.{i}.mlp.{n}_proj.weight": s for i in (0, 1) for n, s in (("up", WIDE), ("down", WIDE[::-1]))
    }
    head = header_bytes((name, "BF16", shape, 2 * math.prod(shape)) for name, shape in shapes.items())
    with open(base / "model.safetensors", "wb") as file:  # zeros that take no disk
        file.write(head)
        file.truncate(len(head) + sum(2 * math.prod(shape) for shape in shapes.values()))
    (base / "config.json").write_text('{"model_type": "small"}')
    lora = {}
    for name, (out, inputs) in shapes.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        lora |= {f"{prefix}.lora_A.weight": torch.ones(64, inputs), f"{prefix}.lora_B.weight": torch.ones(out, 64)}
    save_file(lora, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 16, "target_modules": ["up_proj", "down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    folders = [str(p) for p in (base, adapter, tmp_path / "merged")]
    script = MEMORY.format(root=str(ROOT), folders=folders)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split())
    shutil.rmtree(tmp_path / "merged")
    assert peak - before < 200e6, f"{peak / 1e6:.0f} MB, of which imports {before / 1e6:.0f}"


# --- the report ------------------------------------------------------------------------------------------------------


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
    assert "model.layers.1.up_proj.weight: NaN" in text
    assert "1 of 8 modules have a zero delta" in text and "model.layers.0.self_attn.q_proj" in text
    assert "audio_projector.weight: the adapter's is equal to the base's" in text
    assert "quantised base" in text
    assert read_json(tmp_path / "merged" / "merge_report.json")["stage2"]["quantised_base"] == "4-bit"


# --- what is refused -------------------------------------------------------------------------------------------------


def edited(folder: Path, **changes: Any) -> None:
    document = read_json(folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text(json.dumps({**document, **changes}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected LORA"),
        ({"use_qalora": True}, "use_qalora: QA-LoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: layer replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changed the base weights"),
        ({"r": 5}, "r=5 but lora_A has 4 rows in model.layers.0.down_proj; is this the adapter's own config?"),
        ({"use_dora": True}, "use_dora=True, but model.layers.0.down_proj has no lora_magnitude_vector"),
        ({"lora_alpha": None}, "lora_alpha=None; expected numbers"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan; expected numbers"),
        ({"rank_pattern": [4]}, "rank_pattern is [4], expected an object of regular expressions and numbers"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern has '(', which is no regular expression"),
    ],
)
def test_adapters_that_cannot_be_merged(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    base, adapter, _ = trained(tmp_path, LORA)
    edited(adapter, **changes)
    with pytest.raises(UsageError) as caught:
        run_merge(tmp_path, base, adapter)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("merged*"))


def test_damaged_inputs_are_named(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, LORA)
    file = adapter / "adapter_model.safetensors"
    lora = load_file(file)

    def refused(change: dict[str, torch.Tensor], text: str) -> None:
        save_file(change, file)
        with pytest.raises(UsageError, match=text):
            run_merge(tmp_path, base, adapter)

    name = "base_model.model.model.layers.0.self_attn.q_proj"
    refused({n: t for n, t in lora.items() if n != f"{name}.lora_B.weight"}, "q_proj has no lora_B; is the file whole")
    refused({**lora, f"{name}.lora_C.weight": torch.ones(1)}, "no known LoRA tensor")
    refused({n.replace("layers.0", "layers.9"): t for n, t in lora.items()}, r"the base .* has no model\.layers\.9")
    refused({**lora, f"{name}.lora_A.weight": torch.ones(4, 23)}, r"a weight of \[24, 23\], the base has \[24, 24\]")
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


# --- plan ------------------------------------------------------------------------------------------------------------


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, LORA)
    options = MergeOptions(
        stage1_model_path=Path_(base), stage2_adapter_path=Path_(adapter), output_path=Path_(tmp_path / "merged"),
        max_shard_size="6kB", dry_run=True,
    )  # fmt: skip
    with Run.create(tmp_path / "runs", "merge") as run:
        outcome = command.run(options, run)
    assert outcome.ok and not list(tmp_path.glob("merged*"))
    assert outcome.data["modules_merged"] == 8 and outcome.data["free_bytes"] > 0
    assert sum(s["tensors"] for s in outcome.data["shards"]) == len(load(base))
    options.dry_run = False
    with Run.create(tmp_path / "runs", "merge") as run:
        command.run(options, run)
    written = {f.name: f.stat().st_size for f in (tmp_path / "merged").glob("*.safetensors")}
    assert written == {s["file"]: s["bytes"] for s in outcome.data["shards"]}  # the plan is what happens
    total = sum(f.stat().st_size for f in (tmp_path / "merged").iterdir())
    assert outcome.data["output_bytes"] == pytest.approx(total, rel=0.5)


def test_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, LORA)
    with pytest.raises(UsageError, match="is an input of the merge"):
        run_merge(tmp_path, base, adapter, "base")


def test_same_inputs_give_the_same_bytes_and_a_second_call_finds_them(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, LORA, shards=3)
    one = run_merge(tmp_path, base, adapter, "one", max_shard_size="6kB")
    two = run_merge(tmp_path, base, adapter, "two", max_shard_size="6kB")
    for file in one.iterdir():
        if file.name != plan.REPORT_FILE:
            assert file.read_bytes() == (two / file.name).read_bytes()
    before = {f.name: f.stat().st_mtime_ns for f in one.iterdir()}
    run_merge(tmp_path, base, adapter, "one", max_shard_size="6kB")
    assert {f.name: f.stat().st_mtime_ns for f in one.iterdir()} == before
    assert not list(tmp_path.glob("*.partial"))


def test_folder_of_another_merge_is_not_touched(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, LORA)
    run_merge(tmp_path, base, adapter)
    before = load(tmp_path / "merged")
    edited(adapter, lora_alpha=9)
    with pytest.raises(SurgvqaError, match="not empty, and it was made from other inputs"):
        run_merge(tmp_path, base, adapter)
    assert differences(load(tmp_path / "merged"), before) == []
