"""The checkpoint's own processors: tokenizer, image processor, audio feature extractor. Downloads nothing.

AutoProcessor needs torchvision, and its resize then differs from the one in the model's training by up to 0.03 per
pixel. Pillow's is the same on every machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Qwen2Tokenizer, WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from surgvqa.checkpoint.folder import Checkpoint, open_checkpoint
from surgvqa.data.audio_tokens import HOP, SAMPLE_RATE
from surgvqa.errors import UsageError
from surgvqa.files import read_json
from surgvqa.untrusted import one_line

OLDER_LIMITS = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))


@dataclass
class Processors:
    """Turns text, frames and sound into the model's inputs. Can be pickled for worker processes."""

    tokenizer: Qwen2Tokenizer
    image_processor: Qwen2VLImageProcessorPil
    feature_extractor: WhisperFeatureExtractor
    num_audio_tokens: int
    """Positions of the audio encoder, and the number of a question's audio tokens with audio_span full."""
    num_mel_bins: int
    image_token_id: int
    audio_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    im_start_token_id: int
    im_end_token_id: int
    """Ends a turn and a generated answer."""
    pad_token_id: int

    @property
    def merge_size(self) -> int:
        """The vision tower merges merge_size × merge_size patches into one token."""
        return int(self.image_processor.merge_size)

    @property
    def audio_window_s(self) -> float:
        """Length of the audio encoder's window in seconds."""
        return 2 * self.num_audio_tokens * HOP / SAMPLE_RATE


def load_processors(checkpoint: str | os.PathLike[str]) -> Processors:
    """The processors of a checkpoint folder. Raises UsageError, which names the missing file or key."""
    weights = open_checkpoint(os.fspath(checkpoint))
    folder, config = weights.folder, weights.config
    has_tokenizer = (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )
    if not has_tokenizer:
        raise UsageError(f"{folder}: no tokenizer, expected tokenizer.json, or vocab.json and merges.txt")
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UsageError(f"{folder}: the tokenizer files cannot be read: {error}") from None
    image_processor = _image_processor(folder)

    positions = _shape(weights, "audio_encoder.embed_positions.weight")[0]
    mels = _shape(weights, "audio_encoder.conv1.weight")[1]
    feature_extractor = WhisperFeatureExtractor(  # type: ignore[no-untyped-call]  # upstream has no types here
        feature_size=mels,  # from the encoder's first convolution, because preprocessor files often wrongly say 80
        sampling_rate=SAMPLE_RATE,
        hop_length=HOP,
        chunk_length=-(-2 * positions * HOP // SAMPLE_RATE),
    )

    def id_of(key: str, token: str) -> int:
        """The id in config.json, which the model uses too, else the tokenizer's id of the usual token."""
        for place in (config, config.get("text_config") or {}):
            value = place.get(key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise UsageError(f"{folder / 'config.json'}: {key} is {value!r}, expected a token's number")
            if value is not None:
                return value
        return token_id(token)

    def token_id(token: str) -> int:
        found: int | None = tokenizer.get_vocab().get(token)
        if found is None:
            raise UsageError(f"{folder}: the tokenizer has no token {token}, expected a Qwen2-VL tokenizer")
        return found

    return Processors(
        tokenizer=tokenizer,
        image_processor=image_processor,
        feature_extractor=feature_extractor,
        num_audio_tokens=positions,
        num_mel_bins=mels,
        image_token_id=id_of("image_token_id", "<|image_pad|>"),
        audio_token_id=id_of("audio_token_id", "<|audio_pad|>"),
        vision_start_token_id=id_of("vision_start_token_id", "<|vision_start|>"),
        vision_end_token_id=id_of("vision_end_token_id", "<|vision_end|>"),
        im_start_token_id=token_id("<|im_start|>"),
        im_end_token_id=token_id("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else token_id("<|endoftext|>"),
    )


def _image_processor(folder: Path) -> Qwen2VLImageProcessorPil:
    """The image processor of preprocessor_config.json. Raises UsageError for an invalid file.

    The limits, areas in pixels, are called `min_pixels` and `max_pixels` (in transformers 4.49 to 4.51 inside `size`),
    or in newer versions `shortest_edge` and `longest_edge` inside `size`.
    """
    path = folder / "preprocessor_config.json"
    settings = read_json(path)
    size = settings.get("size")
    limits: dict[str, Any] = {}
    if isinstance(size, dict) and "shortest_edge" not in size:
        limits["size"] = {new: settings.get(old, size.get(old)) for old, new in OLDER_LIMITS}
    try:
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True, **limits)
        numbers = {name: getattr(processor, name) for name in ("patch_size", "temporal_patch_size", "merge_size")}
        numbers |= {f"size.{name}": getattr(processor.size, name) for name in ("shortest_edge", "longest_edge")}
    except Exception as error:  # any error of upstream's checks
        raise UsageError(f"{path}: not a valid image processor: {one_line(str(error))}") from None
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{path}: {name} is {value!r}, expected a whole number above 0")
    return processor


def _shape(checkpoint: Checkpoint, tensor: str) -> tuple[int, ...]:
    if tensor not in checkpoint.tensors:
        raise UsageError(f"{checkpoint.folder}: no tensor {tensor}, expected an audio-grafted Qwen2-VL checkpoint")
    return checkpoint.tensors[tensor].shape
