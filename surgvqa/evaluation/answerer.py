"""A loaded model with its adapter and processors, ready to answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from surgvqa.config.options import AnswerOptions, AskOptions
from surgvqa.data.collate import Collator
from surgvqa.data.dataset import EncodedSample
from surgvqa.data.processors import Processors, load_processors
from surgvqa.evaluation.model_folders import model_folders
from surgvqa.model.adapter import load_adapter
from surgvqa.model.attention import choose_attention
from surgvqa.model.device import choose_device, choose_dtype
from surgvqa.model.generation import LENGTHS, Generator
from surgvqa.model.loading import load_model


@dataclass
class Answerer:
    """A loaded model and what it needs to answer."""

    model: Any
    base: Path
    """Folder of the (base) checkpoint."""
    processors: Processors
    device: torch.device
    max_new_tokens: int
    description: str

    @cached_property
    def generator(self) -> Generator:
        """Generates the answers' tokens."""
        return Generator(self.base_model)

    @property
    def base_model(self) -> Any:
        """The model without PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def batch(self, items: list[EncodedSample]) -> dict[str, Any]:
        """A batch of encoded samples for `answer`, on the model's device."""
        whole = Collator(self.processors, multiple_of=LENGTHS)(items)
        return {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in whole.items()}

    def answer(self, batch: dict[str, Any]) -> list[str]:
        """One greedy answer for each sample of a `batch`, without special tokens or outer spaces."""
        ids = self.generator.answer(
            batch, max_new_tokens=self.max_new_tokens, end_token_id=self.processors.im_end_token_id
        )
        answers = self.processors.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [answer.strip() for answer in answers]


def load_answerer(options: AnswerOptions | AskOptions) -> Answerer:
    """Loads the model of `options.checkpoint`. Raises UsageError when it cannot be loaded."""
    base, adapter = model_folders(options)
    device = choose_device(options.device)
    attention, why = choose_attention(options.attn_implementation, device)
    dtype = choose_dtype(device)
    transformers_logging.disable_progress_bar()
    processors = load_processors(base)
    model: Any = load_model(base, dtype=dtype, device=device, attn_implementation=attention)
    if adapter:
        model = load_adapter(model, adapter)
    name = f"{adapter} on {base}" if adapter else str(base)
    return Answerer(
        model.eval(),
        Path(base),
        processors,
        device,
        options.max_new_tokens,
        f"{name}; {str(dtype).removeprefix('torch.')} on {device}; attention {why}",
    )
