"""A baseline: Whisper recognises the spoken questions, and the model is asked in writing."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import logging as transformers_logging

from surgvqa.config.options import EvaluateOptions
from surgvqa.data.audio import load_audio
from surgvqa.data.audio_tokens import SAMPLE_RATE
from surgvqa.data.lookup import AudioIndex
from surgvqa.data.samples import Sample
from surgvqa.errors import UsageError, first_line
from surgvqa.memory.out_of_memory import empty_cache
from surgvqa.model.device import choose_device, choose_dtype
from surgvqa.runs.folder import Run

AT_ONCE = 8
LONGEST = 96
"""Maximum tokens of a recognised question."""


def recognise(
    samples: Sequence[Sample], audio_dir: str, options: EvaluateOptions, run: Run
) -> tuple[list[Sample], dict[str, Any]]:
    """(the samples with the recognised text as their question, facts for the result).

    Facts: `recognised` texts, `asr_seconds` including loading, and `word_error_rate` against the written questions.
    Raises UsageError when the checkpoint cannot be loaded.
    """
    began = time.monotonic()
    run.phase("recognise", str(options.asr))
    audio = AudioIndex(audio_dir, samples)
    paths = [str(audio.find(sample)) for sample in samples]
    texts = _transcribe(str(options.asr), list(dict.fromkeys(paths)), choose_device(options.device), run)
    recognised = [texts[path] for path in paths]
    errors = sum(word_errors(sample.question, text) for sample, text in zip(samples, recognised))
    facts = {
        "recognised": recognised,
        "asr_seconds": time.monotonic() - began,
        "word_error_rate": errors / max(1, sum(len(_words(sample.question)) for sample in samples)),
    }
    return [replace(sample, question=text) for sample, text in zip(samples, recognised)], facts


def _transcribe(folder: str, paths: list[str], device: torch.device, run: Run) -> dict[str, str]:
    """{recording: recognised text}."""
    transformers_logging.disable_progress_bar()
    try:
        processor: Any = WhisperProcessor.from_pretrained(folder, local_files_only=True)
        model: Any = WhisperForConditionalGeneration.from_pretrained(
            folder, dtype=choose_dtype(device), local_files_only=True
        )
    except Exception as error:  # any error of upstream's checks
        raise UsageError(f"asr: {folder}: cannot be loaded as a Whisper checkpoint: {first_line(error)}") from None
    model.to(device).eval()
    known = {"language": "en", "task": "transcribe"} if getattr(model.generation_config, "is_multilingual", 0) else {}
    found: dict[str, str] = {}
    for start in range(0, len(paths), AT_ONCE):
        part = paths[start : start + AT_ONCE]
        heard = processor([load_audio(path) for path in part], sampling_rate=SAMPLE_RATE, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(
                heard.input_features.to(device, model.dtype), do_sample=False, max_new_tokens=LONGEST, **known
            )
        found |= dict(zip(part, (text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True))))
        run.progress("recognise", len(found), len(paths), "recordings")
    del model
    empty_cache()
    return found


def word_errors(reference: str, text: str) -> int:
    """Words to insert, delete or replace to turn `text` into `reference` (Levenshtein), ignoring case and punctuation.

    The word error rate is their sum divided by the number of words in the references.
    """
    wanted, recognised = _words(reference), _words(text)
    row = list(range(len(recognised) + 1))
    for i, word in enumerate(wanted, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(recognised, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.casefold())
