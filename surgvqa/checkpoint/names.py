"""Names of the tensors and files of a checkpoint."""

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
"""(pattern of transformers 5's module name, replacement with the checkpoint's own); the first match applies."""
CARRIED_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip
"""Files of a checkpoint, other than weights and config.json, that a copy needs too."""


def to_old_name(name: str) -> str:
    """The checkpoint's own (old) name of a tensor or module. An old name is returned unchanged."""
    for pattern, replacement in OLD_NAMES:
        renamed, found = re.subn(pattern, replacement, name)
        if found:
            return renamed
    return name


def to_new_name(name: str) -> str:
    """transformers 5's name of a tensor or module of the checkpoint. Inverts `to_old_name`, except for lm_head."""
    if name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return f"model.{name}" if name.startswith(("visual.", "audio_encoder.", "audio_projector")) else name
