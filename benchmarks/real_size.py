"""Builds the model at its real size, 8.93 B random bf16 parameters, on the GPU in seconds, or as a checkpoint on disk,
and a batch for it:

    python benchmarks/real_size.py FOLDER --like demo/merged [--layers 4 | --two_b]

With 4 of its 28 layers it has 3.3 B parameters. `--two_b` is small enough to train on a CPU: the language model of
Qwen2-VL-2B without its vocabulary, 1.3 B, with encoders as small as the demo's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import Qwen2VLConfig

from surgvqa.merge.plan import REPORT_FILE
from surgvqa.model.audio_qwen2vl import AudioQwen2VLForConditionalGeneration

AUDIO_TOKENS = 1500
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "audio_token_id": 151657,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "model_type": "qwen2_vl"},
    "audio_encoder_config": {
        "d_model": 1280,
        "num_mel_bins": 128,
        "max_source_positions": AUDIO_TOKENS,
        "encoder_layers": 32,
        "encoder_ffn_dim": 5120,
        "encoder_attention_heads": 20,
    },
    "audio_projector_bias": False,
}
TWO_B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}


def build(attention: str = "sdpa", device: str = "cuda", changes: dict[str, Any] | None = None) -> Any:
    """A frozen model in eval mode with random weights, N(0, 0.02) for matrices. `changes` to CONFIG make it smaller."""
    config = Qwen2VLConfig.from_dict({**CONFIG, **(changes or {})})
    torch.manual_seed(0)
    with torch.device(device):
        model = AudioQwen2VLForConditionalGeneration._from_config(
            config, attn_implementation=attention, dtype=torch.bfloat16
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
            elif "norm" in name and name.endswith("weight"):
                parameter.fill_(1)
            else:
                parameter.zero_()
    return model.requires_grad_(False).eval()


def batch(frames: int = 8, grid: tuple[int, int] = (32, 36), answer: int = 12, rows: int = 1, text: int = 64,
          audio: int = AUDIO_TOKENS, device: str = "cuda") -> dict[str, Any]:  # fmt: skip
    """A batch of `rows` samples with `frames` frames of `grid` patches and `audio`, `text` and `answer` tokens.

    Only the answer's tokens are supervised.

    8 frames of 1240×1080 at 512 px are grids of 32×36: 288 tokens each, 3,880 tokens in all.
    """
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> torch.Tensor:
        return torch.randint(1000, 150000, (rows, count), generator=generator)

    def repeated(token: int, count: int) -> torch.Tensor:
        return torch.full((rows, count), token)

    image = [repeated(CONFIG["vision_start_token_id"], 1), repeated(CONFIG["image_token_id"], grid[0] * grid[1] // 4),
             repeated(CONFIG["vision_end_token_id"], 1)]  # fmt: skip
    parts = [words(8), repeated(CONFIG["audio_token_id"], audio), words(text - 8 - 2 * frames), *image * frames]
    ids = torch.cat([*parts, words(answer)], 1)
    labels = ids.clone()
    labels[:, :-answer] = -100
    return {
        "input_ids": ids.to(device),
        "labels": labels.to(device),
        "pixel_values": torch.randn(rows * frames * grid[0] * grid[1], 1176, generator=generator).to(device),
        "image_grid_thw": torch.tensor([[1, *grid]] * (rows * frames)).to(device),
        "input_features": torch.randn(rows, 128, 2 * AUDIO_TOKENS, generator=generator).to(device, torch.bfloat16),
        "audio_tokens": [audio] * rows,
    }


def packed(data: dict[str, Any], model: Any) -> dict[str, Any]:
    """The rows of a `batch` packed into one row (see the model's forward)."""
    rows, length = data["input_ids"].shape
    positions = model._positions(data["input_ids"], None, data["image_grid_thw"], None, 0)
    borders = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=positions.device)
    joined = {name: data[name].reshape(1, -1) for name in ("input_ids", "labels")}
    return {**data, **joined, "position_ids": positions.reshape(3, 1, -1), "cu_seq_lens": borders, "max_length": length}


def write_checkpoint(folder: Path, like: Path, layers: int | None = None, two_b: bool = False) -> int:
    """Writes random weights with the old key names, and the tokenizer and token ids of the small checkpoint `like`.

    Returns the number of parameters. 17.9 GB with all layers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in like.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name and file.name != REPORT_FILE:
            shutil.copy(file, folder / file.name)
    small = json.loads((like / "config.json").read_text())
    changes = {"num_hidden_layers": layers} if layers else {}
    if two_b:
        vision = {**small["vision_config"], "hidden_size": TWO_B["hidden_size"]}
        changes = {**TWO_B, "vision_config": vision}
        changes |= {name: small[name] for name in ("audio_encoder_config", "vocab_size")}
        changes["pad_token_id"] = small["bos_token_id"]
    changes |= {name: small[name] for name in CONFIG if name.endswith("token_id") and name in small}
    model = build(device="cuda" if torch.cuda.is_available() else "cpu", changes=changes)
    model.save_pretrained(folder, max_shard_size="5GB")
    config = {**CONFIG, **changes}
    config.pop("audio_projector_bias")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--like", type=Path, required=True, help="small checkpoint that provides tokenizer and token ids"
    )
    parser.add_argument("--layers", type=int, help="fewer layers of the language model")
    parser.add_argument("--two_b", action="store_true", help="the language model of Qwen2-VL-2B, small encoders")
    given = parser.parse_args()
    count = write_checkpoint(given.folder, given.like, given.layers, given.two_b)
    print(f"{count:,} parameters in {given.folder}")
