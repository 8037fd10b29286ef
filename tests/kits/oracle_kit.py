"""The small oracle: what the author's fork computed, cut to under 3 MB (tests/oracle/cut.py says what was kept)."""

import json
import lzma
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save_file

from surgvqa.checkpoint.architecture import vision_shapes

SMALL = Path(__file__).resolve().parents[1] / "oracle" / "small.safetensors.xz"
IDS = 64
"""Words of the vocabulary whose logits are kept."""
MERGED, ROWS = "model.layers.0.self_attn.k_proj", 16
"""The module whose merged weights are kept, and how many rows of them."""
VOCABULARY, HIDDEN = 2048, 256
CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "audio_hidden_size": 1280,
    "audio_token_id": 2014,
    "eos_token_id": 2002,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "image_token_id": 2012,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
    "model_type": "qwen2_vl",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [8, 12, 12], "rope_type": "default", "type": "default"},
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "video_token_id": 2013,
    "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": HIDDEN, "model_type": "qwen2_vl", "num_heads": 2},
    "vision_end_token_id": 2010,
    "vision_start_token_id": 2009,
    "vision_token_id": 2011,
    "vocab_size": VOCABULARY,
}
"""The oracle's own config.json, but for the vision tower, which is not kept: a small one of zeros stands there."""


def packed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor of -s, 0 and s as bits; any other as it is."""
    values = tensor.unique()
    if len(values) != 3:
        return {name: tensor.contiguous()}
    flat = tensor.float().numpy().ravel()
    assert values[0] == -values[2] and values[1] == 0
    return {
        f"{name}.there": torch.from_numpy(np.packbits(flat != 0)),
        f"{name}.positive": torch.from_numpy(np.packbits(flat[flat != 0] > 0)),
        f"{name}.size": values[2:],
        f"{name}.shape": torch.tensor(tensor.shape, dtype=torch.int32),
    }


def unpacked(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `packed` was given, bf16, by name."""
    found = {name: t for name, t in stored.items() if not name.endswith((".there", ".positive", ".size", ".shape"))}
    for name in {name.removesuffix(".there") for name in stored if name.endswith(".there")}:
        shape = stored[f"{name}.shape"].tolist()
        there = np.unpackbits(stored[f"{name}.there"].numpy())[: math.prod(shape)].astype(bool)
        signs = np.unpackbits(stored[f"{name}.positive"].numpy())[: there.sum()].astype(np.float32) * 2 - 1
        flat = np.zeros(there.size, np.float32)
        flat[there] = signs * stored[f"{name}.size"].float().item()
        found[name] = torch.from_numpy(flat).view(*shape).bfloat16()
    return found


def interpolated(points: torch.Tensor) -> torch.Tensor:
    """100 points a row, float32, as 3,000, bf16."""
    return torch.nn.functional.interpolate(points[None], 3000, mode="linear")[0].bfloat16()


def whisper_positions(length: int, channels: int) -> torch.Tensor:
    """Whisper's sinusoids, bf16 [length, channels]."""
    step = math.log(10000) / (channels // 2 - 1)
    scaled = torch.arange(length)[:, None] * torch.exp(-step * torch.arange(channels // 2))[None]
    return torch.cat([scaled.sin(), scaled.cos()], dim=1).bfloat16()


def open_small(folder: Path) -> dict[str, torch.Tensor]:
    """Writes the small oracle's checkpoint to `folder`; returns the inputs and what the fork computed.

    What was left out is 0: other words' embeddings and logits, and the vision tower.
    """
    kept = unpacked(load(lzma.decompress(SMALL.read_bytes())))
    weights = {name.removeprefix("stage1."): t for name, t in kept.items() if name.startswith("stage1.")}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = kept["input_ids"].unique().long() if "embed" in name else torch.arange(IDS)
        whole = torch.zeros(VOCABULARY, HIDDEN, dtype=torch.bfloat16)
        whole[rows] = weights[name]
        weights[name] = whole
    positions = whisper_positions(1500, 1280).flatten()
    positions[kept["positions.where"].long()] = kept["positions.what"]
    weights["audio_encoder.embed_positions.weight"] = positions.view(1500, 1280)
    shapes = vision_shapes(
        embed_dim=32,
        depth=1,
        mlp_dim=128,
        in_channels=3,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        hidden_size=HIDDEN,
    )
    for name, shape in shapes.items():
        weights[name] = torch.zeros(shape, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    mel = interpolated(kept["mel.points"]).view(torch.int16) + kept["mel.rest"]
    kept["input_features"] = mel.view(torch.bfloat16)[None]
    return {name: t for name, t in kept.items() if not name.startswith(("stage1.", "positions.", "mel."))}
