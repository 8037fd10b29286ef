"""A tiny random model of the real architecture, in the author's format, and samples for it."""

import json
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Qwen2VLConfig

from surgvqa.checkpoint.names import to_old_name
from surgvqa.config.options import LoraOptions
from surgvqa.data.collate import Collator
from surgvqa.model.adapter import adapter_parameters
from surgvqa.model.audio_qwen2vl import AudioQwen2VLForConditionalGeneration
from surgvqa.model.loading import load_model

AUDIO, IMAGE, PAD = 114, 112, 100
POSITIONS = 6
"""Of the tiny Whisper encoder: 12 mel steps, 6 audio tokens."""
CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "audio_token_id": AUDIO,
    "image_token_id": IMAGE,
    "video_token_id": 113,
    "vision_start_token_id": 109,
    "vision_end_token_id": 110,
    "bos_token_id": PAD,
    "eos_token_id": 102,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 120,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vision_config": {"model_type": "qwen2_vl", "depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
}
WHISPER = {
    "d_model": 128,
    "num_mel_bins": 8,
    "max_source_positions": POSITIONS,
    "encoder_layers": 2,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 2,
}


def write_checkpoint(folder: Path, tensors: dict | None = None, **config) -> Path:
    """A checkpoint as the fork wrote it: flat config.json without Whisper's sizes, old key names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(random_tensors() if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def random_tensors(projector_bias: bool = False) -> dict:
    """Weights large enough that every part of the model matters to the logits."""
    extra = {"audio_encoder_config": WHISPER, "audio_projector_bias": projector_bias}
    torch.manual_seed(0)
    model = AudioQwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(CONFIG | extra))
    return {
        to_old_name(name): torch.ones_like(t) if "norm" in name and t.dim() == 1 else torch.randn_like(t) * 0.2
        for name, t in model.state_dict().items()
    }


def load(folder, dtype=torch.float32):
    return load_model(folder, dtype=dtype, device="cpu", attn_implementation="sdpa")


def built(**config) -> AudioQwen2VLForConditionalGeneration:
    """A random model of these sizes."""
    torch.manual_seed(0)
    whole = CONFIG | {"audio_encoder_config": WHISPER, "audio_projector_bias": False} | config
    return AudioQwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(whole)).float().requires_grad_(False).eval()


def sample(seed: int, frames: int = 2, answer: int = 3, text: int = 5) -> dict:
    """One sample [1, L] in the prompt's order: audio, frames of 2×3 tokens, text, answer (supervised)."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(0, PAD, (n,), generator=generator).tolist()

    ids = [*words(2), *[AUDIO] * POSITIONS, *words(1)]
    for _ in range(frames):
        ids += [109, *[IMAGE] * 6, 110]
    ids += words(text)
    prompt = len(ids)
    ids += words(answer)
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "labels": torch.tensor([[-100] * prompt + ids[prompt:]]),
        "pixel_values": torch.randn(frames * 24, 1176, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 6]] * frames),
        "input_features": torch.randn(1, WHISPER["num_mel_bins"], 2 * POSITIONS, generator=generator),
    }


def collate(samples: list[dict], side: str) -> dict:
    length = max(s["input_ids"].shape[1] for s in samples)

    def padded(name: str, value: int) -> torch.Tensor:
        rows = []
        for s in samples:
            missing = length - s[name].shape[1]
            rows.append(F.pad(s[name], (missing, 0) if side == "left" else (0, missing), value=value))
        return torch.cat(rows)

    return {
        "input_ids": padded("input_ids", PAD),
        "attention_mask": padded("attention_mask", 0),
        "labels": padded("labels", -100),
        **{
            name: torch.cat([s[name] for s in samples]) for name in ("pixel_values", "image_grid_thw", "input_features")
        },
    }


def prompt_of(batch: dict) -> dict:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def generate(model, batch: dict, **kwargs):
    prompt = prompt_of(batch)
    tokens = model.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=PAD, **kwargs)
    return tokens[:, prompt["input_ids"].shape[1] :].tolist()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def encoded(sample: dict) -> dict:
    """A sample of `sample` as data/dataset.py encodes it: arrays, and how many audio tokens it has."""
    one_row = ("input_ids", "labels", "input_features")
    arrays = {name: (t[0] if name in one_row else t).numpy() for name, t in sample.items()}
    return arrays | {"audio_tokens": int((arrays["input_ids"] == AUDIO).sum())}


def packed(samples: list[dict], multiple_of: int = 1) -> dict:
    """As training packs them, without the mask that the trainer leaves out."""
    items = [encoded(s) for s in samples]
    processors = types.SimpleNamespace(pad_token_id=PAD, image_token_id=IMAGE, merge_size=2)
    batch = Collator(processors, multiple_of=multiple_of, packed=True)(items)
    assert batch["input_ids"].shape == (1, int(batch["cu_seq_lens"][-1]))
    assert batch.pop("attention_mask").sum() == sum(s["input_ids"].shape[1] for s in samples)
    return batch


def gradients(model, batch) -> dict:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def lora_options(**changes) -> LoraOptions:
    return LoraOptions(**({"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | changes))


def with_weights(peft_model):
    """The adapter with random B matrices: a fresh LoRA adds nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter_parameters(peft_model).items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return peft_model
