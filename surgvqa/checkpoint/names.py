"""Names in a checkpoint: of tensors, and of the files that a checkpoint folder holds."""

from __future__ import annotations

import re

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
OLD_NAMES: tuple[tuple[str, str], ...] = (
    (r"^model\.language_model\.", "model."),
    (r"^model\.visual\.", "visual."),
    (r"^model\.(audio_encoder|audio_projector)(\.|$)", r"\1\2"),
    (r"^model\.lm_head(\.|$)", r"lm_head\1"),
)
"""What transformers 5 calls a module -> what the checkpoint's own files call it; the first rule that matches."""
CARRIED_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip
"""What a checkpoint folder holds besides weights and config.json, and a copy of it must hold too."""


def to_old_name(name: str) -> str:
    """The checkpoint's own (old) name of a tensor or module; an old name stays as it is."""
    for pattern, replacement in OLD_NAMES:
        renamed, found = re.subn(pattern, replacement, name)
        if found:
            return renamed
    return name


def to_new_name(name: str) -> str:
    """What transformers 5 calls a tensor or module of the checkpoint: the inverse of `to_old_name`, but for lm_head."""
    if name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return f"model.{name}" if name.startswith(("visual.", "audio_encoder.", "audio_projector")) else name
