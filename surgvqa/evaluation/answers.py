"""The answers to a file of samples: known answers are reused, and a model is loaded only for the others."""

from __future__ import annotations

import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from surgvqa import __version__
from surgvqa.config.options import AnswerOptions, DataOptions, EvaluateOptions
from surgvqa.config.settings import settings_of
from surgvqa.data.samples import Sample, read_samples
from surgvqa.evaluation.known import Answer, KnownAnswers, context_key, sample_keys
from surgvqa.evaluation.model_folders import model_folders, required
from surgvqa.model.attention import choose_attention
from surgvqa.model.device import choose_device, choose_dtype
from surgvqa.provenance.hashes import Hashes
from surgvqa.runs.folder import Run


def find_answers(options: EvaluateOptions, run: Run) -> tuple[list[Sample], list[Answer], dict[str, Any]]:
    """(samples, (answer, milliseconds) for each, facts for the result).

    Answers of earlier runs in this workspace and of a resumed run are reused. Each new answer is on the disk before the
    next batch is asked.
    """
    samples = read_samples(required(options, "eval_data_path"))
    audio_dir = str(options.eval_audio_dir or options.audio_dir)
    asked, recognised = samples, dict[str, Any]()
    if options.asr:
        from surgvqa.evaluation.asr import recognise

        asked, recognised = recognise(samples, audio_dir, options, run)
    run.phase("look for known answers", str(options.checkpoint))
    cache = run.workspace / "cache"
    hashes = Hashes(cache)
    context = context_key(settings_of_answers(options, hashes))
    keys = sample_keys(
        asked,
        required(options, "frames_dir"),
        audio_dir,
        hashes,
        context,
        num_frames=options.num_frames,
        input_mode=options.input_mode,
    )
    hashes.save()
    file = cache / "answers" / f"{context}.jsonl" if options.answer_cache == "auto" else None
    with closing(KnownAnswers(samples, keys, run.folder, file)) as known:
        reused = known.resume_from(Path(options.resume)) if options.resume else 0
        rest = known.unanswered()
        if options.resume and rest and not reused:
            run.warning(
                f"resume: {Path(options.resume).name} left no answer that can be used here: it has finished, answered "
                f"nothing, or had another model or settings; {len(rest)} of {len(samples)} samples are asked again"
            )
        facts: dict[str, Any] = {
            "checkpoint": str(Path(required(options, "checkpoint")).absolute()),
            "answered": len(rest),
            "from_cache": len(samples) - len(rest),
            **recognised,
        }
        if facts["from_cache"]:
            run.phase("answers", f"{facts['from_cache']} of {len(samples)} are already known")
        if rest:
            from surgvqa.evaluation.generate import answer_some

            coming, began = iter(rest), time.monotonic()
            facts |= answer_some(options, asked, rest, lambda *answer: known.add(next(coming), *answer), run)
            facts["answer_seconds"] = time.monotonic() - began
        return samples, known.answers(), facts


def settings_of_answers(options: AnswerOptions, hashes: Hashes) -> dict[str, Any]:
    """Everything that an answer depends on, apart from its sample. The batch size is not included, because padding does
    not change answers."""
    base, adapter = model_folders(options)
    device = choose_device(options.device)
    return {
        "base": hashes.of_weights(base),
        "adapter": hashes.of_weights(adapter) if adapter else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(choose_dtype(device)),
        "attention": choose_attention(options.attn_implementation, device)[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")} | {"surgvqa": __version__},
        **{name: getattr(options, name) for name in ("max_new_tokens", *settings_of(DataOptions))},
    }
