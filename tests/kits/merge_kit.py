"""Adapters and bases for tests of the merge: made by PEFT on a small model, and merged by PEFT to compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from surgvqa.config.options import MergeOptions
from surgvqa.config.settings import Path_
from surgvqa.files import read_json
from surgvqa.merge import command
from surgvqa.runs.folder import Run


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

    def get_input_embeddings(self) -> nn.Module:
        """Asked by PEFT, which saves the base of an embedding or a head that has LoRA."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


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
    theirs = merged_by_peft(fresh, tmp / "adapter")
    return base, tmp / "adapter", theirs


def merged_by_peft(model: Small, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT makes of a base and an adapter on disk, as bf16 tensors; a tied head once."""
    done = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().to(torch.bfloat16)
    theirs = {n: t.detach().clone() for n, t in done.state_dict().items()}
    if done.lm_head.weight is done.model.embed_tokens.weight:
        del theirs["lm_head.weight"]
    return theirs


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}


def edited(folder: Path, **changes: Any) -> None:
    document = read_json(folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text(json.dumps({**document, **changes}))
