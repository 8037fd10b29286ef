"""The model at its real size, 8.93 B random bf16 parameters, built on the GPU in seconds; and one batch for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2VLConfig

from surgvqa.model import AudioQwen2VLForConditionalGeneration

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


def build(attention: str = "sdpa", device: str = "cuda", layers: int | None = None) -> Any:
    """Random weights, N(0, 0.02) for matrices, frozen, in eval mode. `layers` cuts the language model for a dry run."""
    config = Qwen2VLConfig.from_dict({**CONFIG, **({"num_hidden_layers": layers} if layers else {})})
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
          device: str = "cuda") -> dict[str, torch.Tensor]:  # fmt: skip
    """`rows` samples: `frames` frames of `grid` patches, 1,500 audio tokens, `text` words, `answer` supervised tokens.

    8 frames of 1240×1080 at 512 px are grids of 32×36: 288 tokens each, 3,880 tokens in all.
    """
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> torch.Tensor:
        return torch.randint(1000, 150000, (rows, count), generator=generator)

    def repeated(token: int, count: int) -> torch.Tensor:
        return torch.full((rows, count), token)

    image = [repeated(CONFIG["vision_start_token_id"], 1), repeated(CONFIG["image_token_id"], grid[0] * grid[1] // 4),
             repeated(CONFIG["vision_end_token_id"], 1)]  # fmt: skip
    parts = [words(8), repeated(CONFIG["audio_token_id"], AUDIO_TOKENS), words(text - 8 - 2 * frames), *image * frames]
    ids = torch.cat([*parts, words(answer)], 1)
    labels = ids.clone()
    labels[:, :-answer] = -100
    return {
        "input_ids": ids.to(device),
        "labels": labels.to(device),
        "pixel_values": torch.randn(rows * frames * grid[0] * grid[1], 1176, generator=generator).to(device),
        "image_grid_thw": torch.tensor([[1, *grid]] * (rows * frames)).to(device),
        "input_features": torch.randn(rows, 128, 2 * AUDIO_TOKENS, generator=generator).to(device, torch.bfloat16),
    }
