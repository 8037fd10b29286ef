"""The merge against PEFT's own, bit by bit, and against the oracle."""

from __future__ import annotations

import json
import math
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
from merge_kit import LORA, differences, edited, load, run_merge, trained  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from surgvqa.checkpoint.audit import audit  # noqa: E402
from surgvqa.checkpoint.folder import open_checkpoint  # noqa: E402
from surgvqa.checkpoint.headers import header_bytes  # noqa: E402
from surgvqa.config.options import MergeOptions  # noqa: E402
from surgvqa.config.settings import Path_  # noqa: E402
from surgvqa.errors import SurgvqaError, UsageError  # noqa: E402
from surgvqa.files import read_json  # noqa: E402
from surgvqa.merge import arithmetic, command, plan  # noqa: E402
from surgvqa.runs.folder import Run  # noqa: E402

pytestmark = pytest.mark.model


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
        monkeypatch.setattr(arithmetic, "addmm_is_exact", lambda *_: False)
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

    tried = arithmetic.addmm_is_exact.__wrapped__  # not the cached one
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
