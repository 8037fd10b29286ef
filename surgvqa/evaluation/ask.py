"""`surgvqa ask`: one answer to one spoken question about one clip. Its text is all that goes to stdout."""

from __future__ import annotations

import time
from pathlib import Path

from surgvqa.config.options import AskOptions
from surgvqa.config.workspace import Workspace
from surgvqa.errors import UsageError
from surgvqa.evaluation.model_folders import model_folders
from surgvqa.outcome import Outcome


def check(options: AskOptions) -> None:
    """UsageError when the checkpoint, a frame or the spoken question is not there."""
    for name, paths in (("frames", options.frames), ("audio", [options.audio])):
        for path in paths:
            if not Path(path).is_file():
                raise UsageError(f"{path}: no such file ({name})")
    if options.input_mode == "audio_text" and not options.question:
        raise UsageError("input_mode is audio_text, where the question is also written: give it with --question")
    model_folders(options)


def run(options: AskOptions, workspace: Workspace) -> Outcome:
    """Loads the model and answers."""
    from surgvqa.data.dataset import encode
    from surgvqa.data.frames import select_frames
    from surgvqa.evaluation.answerer import load_answerer

    began = time.monotonic()
    answerer = load_answerer(options)
    loaded = time.monotonic()
    item = encode(
        answerer.processors,
        select_frames(options.frames, options.num_frames),
        options.audio,
        image_size=options.image_size,
        input_mode=options.input_mode,
        question=options.question or "",
    )
    (answer,) = answerer.answer(answerer.batch([item]))
    data = {
        "answer": answer,
        "seconds": time.monotonic() - loaded,
        "load_seconds": loaded - began,
        "frames": min(len(options.frames), options.num_frames),
        "sequence_tokens": len(item["input_ids"]),
        "model": answerer.description,
    }
    return Outcome(data, show=lambda console: console.print(answer, markup=False, soft_wrap=True))
