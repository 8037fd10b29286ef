"""Loads a checkpoint into the model and checks that every tensor is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Qwen2VLConfig
from transformers.utils.logging import disable_progress_bar

from surgvqa.checkpoint.config_json import whisper_config
from surgvqa.checkpoint.folder import Checkpoint, open_checkpoint
from surgvqa.checkpoint.names import to_old_name
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.model.audio_qwen2vl import AudioQwen2VLForConditionalGeneration


def load_model(
    folder: str | Path, *, dtype: torch.dtype, device: str | torch.device, attn_implementation: str
) -> AudioQwen2VLForConditionalGeneration:
    """The checkpoint's model on `device`, in eval mode with every parameter frozen.

    On a GPU the token embeddings stay on the host. Tensors are copied once, from the file to the device. Raises
    UsageError when `folder` is not such a checkpoint, SurgvqaError when a tensor is missing, unused or of another shape
    than the model's.
    """
    checkpoint = open_checkpoint(folder).require_sound()
    config = checkpoint_config(checkpoint)
    _check_tensors(config, checkpoint)
    disable_progress_bar()  # transformers draws one on stderr; progress belongs in the run folder
    loaded: Any = AudioQwen2VLForConditionalGeneration.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        device_map={"": device},
        attn_implementation=attn_implementation,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    model: AudioQwen2VLForConditionalGeneration = loaded[0]
    report: dict[str, Any] = loaded[1]
    # After the check above, this can only fail if transformers maps names differently.
    if left := {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]}:
        raise SurgvqaError(f"{folder}: transformers did not load {_first_names(left)}")
    if torch.device(device).type == "cuda":
        model.embeddings_to_host()
    model.requires_grad_(False).eval()
    return model


def _check_tensors(config: Qwen2VLConfig, checkpoint: Checkpoint) -> None:
    """Raises SurgvqaError unless the files have exactly the model's tensors in the model's shapes.

    Called before anything is loaded, so that a wrong 18 GB checkpoint fails in a second, with the checkpoint's names.
    """
    with torch.device("meta"):
        skeleton = AudioQwen2VLForConditionalGeneration(config)
    expected = {to_old_name(name): tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    found = {name: info.shape for name, info in checkpoint.tensors.items()}
    folder = checkpoint.folder
    missing = expected.keys() - found.keys()
    if config.tie_word_embeddings:
        missing -= {"lm_head.weight"}
    hint = "does config.json belong to this checkpoint, and are all shards present?"
    if missing:
        raise SurgvqaError(f"{folder}: not in the checkpoint: {_first_names(missing)}; {hint}")
    if extra := found.keys() - expected.keys():
        raise SurgvqaError(f"{folder}: not in the model: {_first_names(extra)}; {hint}")
    for name in sorted(expected):
        if name in found and found[name] != expected[name]:
            raise SurgvqaError(
                f"{folder}: {name} is {list(found[name])} but config.json calls for {list(expected[name])}; {hint}"
            )


def checkpoint_config(checkpoint: Checkpoint) -> Qwen2VLConfig:
    """The checkpoint's config.json (flat, as the fork wrote it, or nested), completed from the tensors' shapes.

    Adds `audio_encoder_config`, if missing, and `audio_projector_bias`. Raises UsageError for another architecture.
    """
    path, raw = checkpoint.folder / "config.json", dict(checkpoint.config)
    if raw.get("model_type") != "qwen2_vl" or "audio_token_id" not in raw:
        raise UsageError(
            f'{path}: expected "model_type": "qwen2_vl" and an "audio_token_id"; this is not an audio-grafted Qwen2-VL'
        )
    raw.pop("quantization_config", None)  # ignored, because the tensors are not quantised (checked above)
    raw["audio_encoder_config"] = raw.get("audio_encoder_config") or whisper_config(checkpoint.tensors)
    if not raw["audio_encoder_config"]:
        raise UsageError(f"{checkpoint.folder}: no Whisper encoder (audio_encoder.*) among the checkpoint's tensors")
    raw["audio_projector_bias"] = "audio_projector.bias" in checkpoint.tensors
    try:
        return Qwen2VLConfig.from_dict(raw)
    except StrictDataclassError as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None


def _first_names(names: Any, shown: int = 5) -> str:
    names = sorted(map(str, names))
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
