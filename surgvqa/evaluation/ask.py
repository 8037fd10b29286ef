"""`surgvqa ask`: one answer to one spoken question about one clip. Prints only the answer's text to stdout."""

from __future__ import annotations

from pathlib import Path

from surgvqa.config.options import AskOptions
from surgvqa.config.workspace import Workspace
from surgvqa.errors import UsageError
from surgvqa.evaluation.model_folders import require_model
from surgvqa.outcome import Outcome


def check(options: AskOptions) -> None:
    """Raises UsageError when the checkpoint, a frame or the spoken question is missing."""
    if not options.interactive:
        if not options.frames:
            raise UsageError("missing --frames; or --interactive chooses among the samples of a file")
        if options.input_mode != "text_only" and not options.audio:
            raise UsageError(f"input_mode is {options.input_mode}, which needs a spoken question: give it with --audio")
        for name, paths in (("frames", options.frames), ("audio", [options.audio] if options.audio else [])):
            for path in paths:
                if not Path(path).is_file():
                    raise UsageError(f"{path}: no such file ({name})")
        if options.input_mode != "audio_only" and not options.question:
            mode = options.input_mode
            raise UsageError(f"input_mode is {mode}, which needs a written question: give it with --question")
    require_model(options)


def run(options: AskOptions, workspace: Workspace) -> Outcome:
    """Loads the model and answers."""
    if options.interactive:
        from surgvqa.evaluation.interactive import run as interact

        return interact(options)
    from surgvqa.evaluation.asker import Asker

    asker = Asker(options)
    found = asker.ask(options.frames or [], options.audio, options.question)
    data = {**found, "load_seconds": asker.load_seconds, "model": asker.answerer.description}
    return Outcome(data, show=lambda console: console.print(found["answer"], markup=False, soft_wrap=True))
