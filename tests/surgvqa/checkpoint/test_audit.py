"""The audit: what it finds, that it stays off torch and stays fast, and the BF16 copy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_kit import Spec, write_folder

from surgvqa.checkpoint import architecture as architecture_room
from surgvqa.checkpoint import audit as room
from surgvqa.checkpoint.architecture import expected_tensors
from surgvqa.checkpoint.audit import audit
from surgvqa.checkpoint.folder import open_checkpoint
from surgvqa.checkpoint.headers import header_bytes
from surgvqa.checkpoint.names import INDEX_FILE
from surgvqa.config.options import AuditOptions
from surgvqa.config.settings import Path_
from surgvqa.errors import UsageError
from surgvqa.terminal import reporter

CONFIG: dict[str, Any] = {
    "model_type": "qwen2_vl", "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 16, "use_audio_encoder": True,
    "audio_hidden_size": 4, "vision_config": {"depth": 1, "embed_dim": 4},
    "audio_encoder_config": {
        "d_model": 4, "encoder_layers": 1, "encoder_ffn_dim": 8, "num_mel_bins": 3, "max_source_positions": 5
    },
}  # fmt: skip


def architecture(tmp: Path, config: dict[str, Any] = CONFIG) -> Spec:
    """Every tensor of the configuration, by our own table (which test_table_is_the_oracles holds to the real one)."""
    write_folder(tmp / "empty", [{"x": ("BF16", (1,))}], config)
    return {n: ("BF16", s) for n, s in expected_tensors(open_checkpoint(tmp / "empty")).items()}


def of(tmp: Path, spec: Spec, config: dict[str, Any] = CONFIG, name: str = "c") -> dict[str, Any]:
    names = list(spec)
    write_folder(tmp / name, [{n: spec[n] for n in names[k::3]} for k in range(3)], config)
    return audit(open_checkpoint(tmp / name))


def test_table_is_the_oracles(oracle: Path) -> None:
    for name in ("stage1", "merged"):
        checkpoint = open_checkpoint(oracle / name)
        assert expected_tensors(checkpoint) == {n: t.shape for n, t in checkpoint.tensors.items()}
        data = audit(checkpoint)
        assert data["ok"] and data["problems"] == [] and data["dtypes"] == {"BF16": data["tensors"]} == {"BF16": 93}


def test_a_sound_checkpoint(tmp_path: Path) -> None:
    spec = architecture(tmp_path)
    data = of(tmp_path, spec)
    assert data["ok"], data["problems"]
    assert data["tensors"] == len(spec) and data["missing"] == data["extra"] == data["offenders"] == []
    tied = {n: s for n, s in spec.items() if n != "lm_head.weight"}
    assert of(tmp_path, tied, {**CONFIG, "tie_word_embeddings": True}, "tied")["ok"]


def test_each_offender_is_named(tmp_path: Path) -> None:
    spec = architecture(tmp_path)
    spec["model.norm.weight"] = ("F32", (8,))
    spec["audio_projector.weight"] = ("F16", (8, 4))
    data = of(tmp_path, spec)
    assert not data["ok"] and data["problems"] == []
    assert data["dtypes"] == {"BF16": len(spec) - 2, "F32": 1, "F16": 1}
    listed = {e["name"]: (e["dtype"], e["shape"]) for e in data["offenders"]}
    assert listed == {"model.norm.weight": ("F32", [8]), "audio_projector.weight": ("F16", [8, 4])}
    assert all((tmp_path / "c" / e["shard"]).is_file() for e in data["offenders"])


def test_missing_extra_and_wrong_shapes(tmp_path: Path) -> None:
    spec = architecture(tmp_path)
    del spec["model.layers.1.self_attn.k_proj.bias"], spec["audio_encoder.layers.0.fc2.weight"]
    spec["audio_projector.gain"] = ("BF16", (4,))
    spec["visual.merger.mlp.2.weight"] = ("BF16", (8, 15))
    data = of(tmp_path, spec)
    assert data["missing"] == ["audio_encoder.layers.0.fc2.weight", "model.layers.1.self_attn.k_proj.bias"]
    assert data["extra"] == ["audio_projector.gain"]
    text = "\n".join(data["problems"])
    assert "model.layers.1.self_attn.k_proj.bias: missing, config.json calls for [4]" in text
    assert "audio_projector.gain: not a tensor of this architecture" in text
    assert "visual.merger.mlp.2.weight: is [8, 15], config.json calls for [8, 16]" in text
    assert len(data["problems"]) == 4 and not data["ok"]


def test_a_lost_audio_encoder_is_missed(tmp_path: Path) -> None:
    """Without any audio tensor nothing can be read off headers; config.json still says that there must be one."""
    config = {k: v for k, v in CONFIG.items() if k != "audio_encoder_config"}
    spec = {n: s for n, s in architecture(tmp_path).items() if not n.startswith("audio")}
    data = of(tmp_path, spec, config)
    assert "audio_encoder.conv1.weight" in data["missing"] and "audio_projector.weight" in data["missing"]


def test_damage_quantisation_and_other_architectures(tmp_path: Path) -> None:
    spec = architecture(tmp_path)
    of(tmp_path, spec)
    victim = tmp_path / "c" / "model-00002-of-00003.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    data = audit(open_checkpoint(tmp_path / "c"))
    assert not data["ok"] and "truncated" in data["problems"][0] and victim.name in data["problems"][0]
    packed = {**spec, "model.layers.0.mlp.up_proj.weight.absmax": ("F32", (2,))}
    assert any("this checkpoint is 4-bit" in p for p in of(tmp_path, packed, name="packed")["problems"])
    write_folder(tmp_path / "other", [{"a": ("BF16", (2,))}], {"model_type": "bert"})
    other = audit(open_checkpoint(tmp_path / "other"))
    assert other["ok"] and other["architecture"] is None


@pytest.mark.parametrize("key", [*architecture_room.LANGUAGE_SIZES, "model_type"])
def test_a_key_that_config_json_lacks_is_named(tmp_path: Path, key: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != key}
    data = of(tmp_path, architecture(tmp_path), config)
    assert not data["ok"] and any(f"config.json: {key} is missing" in text for text in data["problems"])


@pytest.mark.parametrize("key", ["depth", "embed_dim"])
def test_a_key_that_vision_config_lacks_is_named_where_the_default_does_not_fit(tmp_path: Path, key: str) -> None:
    vision = {name: value for name, value in CONFIG["vision_config"].items() if name != key}
    data = of(tmp_path, architecture(tmp_path), {**CONFIG, "vision_config": vision})
    (problem,) = data["problems"]
    assert f"vision_config.{key} is missing: the default is" in problem


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 2.5},
        {"hidden_size": "8"},
        {"num_attention_heads": 0},
        {"vocab_size": True},
        {"audio_hidden_size": "x", "audio_encoder_config": None},
        {"vision_config": {**CONFIG["vision_config"], "depth": 10**9}},
        {"vision_config": {**CONFIG["vision_config"], "mlp_ratio": float("nan")}},
        {"vision_config": {**CONFIG["vision_config"], "temporal_patch_size": "x"}},
        {"audio_encoder_config": {"encoder_layers": 10**9}},
    ],
    ids=str,
)
def test_a_size_that_none_can_be_is_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    """10⁹ layers took 7 GB of names."""
    data = of(tmp_path, architecture(tmp_path), {**CONFIG, **changes})
    (problem,) = data["problems"]
    key = next(iter(changes))
    assert "config.json: " in problem and key in problem and ", expected a" in problem and len(problem) < 400


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "surgvqa", "audit", *map(str, arguments)], capture_output=True, text=True
    )


def test_command(tmp_path: Path) -> None:
    spec = architecture(tmp_path)
    of(tmp_path, spec)
    done = command(tmp_path / "c")
    assert done.returncode == 0 and "every tensor is BF16" in done.stdout
    of(tmp_path, {**spec, "model.norm.weight": ("F32", (8,))}, name="bad")
    done = command(tmp_path / "bad")
    assert done.returncode == 1 and "model.norm.weight  F32  [8]" in done.stdout and not done.stderr
    document = json.loads(command(tmp_path / "bad", "--json").stdout)
    assert document["offenders"][0]["name"] == "model.norm.weight" and document["ok"] is False
    done = command(tmp_path / "nowhere")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no such checkpoint folder" in done.stderr


def sparse_real_checkpoint(folder: Path) -> tuple[int, int]:
    """Headers of the real model's size over files that are holes: 18 GB, about 1,300 tensors."""
    config = {
        "model_type": "qwen2_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4, "num_hidden_layers": 28, "vocab_size": 152064, "use_audio_encoder": True,
        "vision_config": {"depth": 32, "embed_dim": 1280},
        "audio_encoder_config": {
            "d_model": 1280, "encoder_layers": 32, "encoder_ffn_dim": 5120, "num_mel_bins": 128,
            "max_source_positions": 1500,
        },
    }  # fmt: skip
    spec = architecture(folder.parent, config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names, weight_map, total = list(spec), {}, 0
    for k in range(4):
        entries = []
        for name in names[k::4]:
            size = 2
            for n in spec[name][1]:
                size *= n
            entries.append((name, *spec[name], size))
        file = folder / f"model-{k + 1:05d}-of-00004.safetensors"
        head = header_bytes(entries)
        file.write_bytes(head)
        os.truncate(file, len(head) + sum(e[3] for e in entries))
        total += sum(e[3] for e in entries)
        weight_map |= {e[0]: file.name for e in entries}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return len(spec), total


def test_of_eighteen_gigabytes_the_headers_are_read_and_torch_is_not_imported(tmp_path: Path) -> None:
    """What makes it quick; benchmarks/merge.py has the seconds."""
    count, total = sparse_real_checkpoint(tmp_path / "real")
    assert total > 17.5e9 and count > 1200
    script = (
        "import sys; from surgvqa.cli.main import main; code = main(); "
        "heavy = {'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules); assert not heavy, heavy; "
        "print(len(sys.modules), open('/proc/self/io').read().split()[1], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "audit", tmp_path / "real", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["tensors"] == count
    modules, read = map(int, done.stderr.split())
    assert modules < 600 and read < 40e6  # Python's own files are most of it


# --- --deep and --fix ------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_deep_finds_nan_and_infinity(tmp_path: Path) -> None:
    spec = architecture(tmp_path)
    of(tmp_path, spec)
    assert room.run(AuditOptions(checkpoint=Path_(tmp_path / "c"), deep=True), None).ok
    info = open_checkpoint(tmp_path / "c").tensors["model.layers.1.mlp.up_proj.weight"]
    with open(info.file, "r+b") as stream:
        stream.seek(info.offset + 10)
        stream.write(b"\xc0\x7f\xc0\x7f\x80\xff")  # bf16 little-endian: NaN, NaN, -infinity
    assert audit(open_checkpoint(tmp_path / "c"))["ok"]  # headers alone cannot tell
    outcome = room.run(AuditOptions(checkpoint=Path_(tmp_path / "c"), deep=True), None)
    assert not outcome.ok
    wanted = {"name": "model.layers.1.mlp.up_proj.weight", "nan": 2, "inf": 1, "shard": info.file.name}
    assert outcome.data["not_finite"] == [wanted]


@pytest.mark.model
def test_deep_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = of(tmp_path, architecture(tmp_path))
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(
        reporter.TerminalReporter, "emit", lambda _, kind, **fields: told.append({"kind": kind, **fields})
    )
    room.run(AuditOptions(checkpoint=Path_(tmp_path / "c"), deep=True), None)
    last = [e for e in told if e["kind"] == "progress"][-1]
    assert last["phase"] == "scan" and last["done"] == last["total"] == data["bytes"] and last["unit"] == "bytes"


@pytest.mark.model
def test_fix_writes_a_bf16_copy(tmp_path: Path, oracle: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = tmp_path / "mixed"
    shutil.copytree(oracle / "stage1", source)
    first, second = sorted(source.glob("*.safetensors"))[:2]
    save_file({n: t.float() * 1.0001 for n, t in load_file(first).items()}, first, {"format": "pt"})
    save_file({n: t.half() for n, t in load_file(second).items()}, second, {"format": "pt"})

    def fix(output: Path) -> Any:
        return room.run(AuditOptions(checkpoint=Path_(source), fix=Path_(output)), None)

    assert not audit(open_checkpoint(source))["ok"]
    assert fix(tmp_path / "bf16").ok
    assert audit(open_checkpoint(tmp_path / "bf16"))["ok"]
    before = {n: t for f in source.glob("*.safetensors") for n, t in load_file(f).items()}
    after = {n: t for f in (tmp_path / "bf16").glob("*.safetensors") for n, t in load_file(f).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], t.to(torch.bfloat16)) for n, t in before.items())
    assert (tmp_path / "bf16" / "tokenizer.json").is_file()
    assert fix(tmp_path / "bf16").ok  # there already, verified
    with pytest.raises(UsageError, match="is the checkpoint itself"):
        fix(source)
