"""Finds the folders for `--checkpoint`: an adapter and its base, or a full checkpoint."""

from __future__ import annotations

from pathlib import Path

from surgvqa.checkpoint.folder import open_checkpoint
from surgvqa.config.options import AnswerOptions, AskOptions
from surgvqa.errors import UsageError
from surgvqa.files import read_json
from surgvqa.training import checkpoints, results

ADAPTER_CONFIG = "adapter_config.json"


def require_whisper(folder: str) -> None:
    """Raises UsageError unless the config.json in `folder` is Whisper's. Does not check the weights."""
    config = Path(folder) / "config.json"
    kind = read_json(config).get("model_type")
    if kind != "whisper":
        raise UsageError(f"asr: {config}: model_type is {kind!r}, expected 'whisper'")


AS_TRAINED = {"input_mode": None, "audio_span": "full"}
"""{option that must be as in training: its value if the training's record does not name it}."""


def required(options: AnswerOptions | AskOptions, name: str) -> str:
    """The value of an option that this evaluation needs. Raises UsageError when it is missing."""
    value = getattr(options, name)
    if not value:
        raise UsageError(f"missing --{name}")
    return str(value)


def require_model(options: AnswerOptions | AskOptions) -> None:
    """Raises UsageError unless `options.checkpoint` exists and was trained with the same way of asking."""
    base, adapter = model_folders(options)
    record = results.read(adapter) if adapter else results.read(base) or results.merged(base)
    if not record or options.force:
        return
    for name, unsaid in AS_TRAINED.items():
        trained, asked = record.options.get(name) or unsaid, getattr(options, name)
        if trained and trained != asked:
            raise UsageError(
                f"{adapter or base}: trained with {name} {trained}, but these options ask with {asked}; "
                "use --force to ask anyway"
            )


def model_folders(options: AnswerOptions | AskOptions) -> tuple[Path, Path | None]:
    """(base checkpoint, adapter or None) for `options.checkpoint`.

    It may be an adapter, the output folder of a training run, or a full checkpoint. Raises UsageError for anything else
    and for an adapter without a base.
    """
    folder = Path(required(options, "checkpoint"))
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected an adapter or checkpoint folder, or a run id")
    record = results.read(folder)
    whole = (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file()
    if not whole or (
        record and record.step is None
    ):  # a run that has not ended, perhaps in the folder of an earlier one that has
        unfinished, _ = checkpoints.newest_complete_checkpoint(folder)
        if unfinished is None and record and not whole:
            raise UsageError(f"{folder}: the folder of a training run that has not saved an adapter yet")
        folder = unfinished or folder
    if not (folder / ADAPTER_CONFIG).is_file():
        open_checkpoint(folder).require_sound()
        return folder, None
    record = results.read(folder)
    base = options.model_name_or_path or (record and record.options.get("model_name_or_path"))
    base = base or read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        raise UsageError(
            f"{folder}: an adapter, but its base checkpoint {base or ''} is not here; give --model_name_or_path DIR"
        )
    open_checkpoint(base).require_sound()
    return Path(base), folder
