"""Which folders a `--checkpoint` means: an adapter and its base, or a whole checkpoint."""

from __future__ import annotations

from pathlib import Path

from surgvqa.checkpoint.folder import open_checkpoint
from surgvqa.config.options import AskOptions, EvaluateOptions
from surgvqa.errors import UsageError
from surgvqa.files import read_json
from surgvqa.training import checkpoints, results

ADAPTER_CONFIG = "adapter_config.json"


def required(options: EvaluateOptions | AskOptions, name: str) -> str:
    """The option that this evaluation cannot do without; UsageError when it is not given."""
    value = getattr(options, name)
    if not value:
        raise UsageError(f"missing --{name}")
    return str(value)


def model_folders(options: EvaluateOptions | AskOptions) -> tuple[Path, Path | None]:
    """(base checkpoint, adapter or None) that `options.checkpoint` stands for: an adapter, the output folder of a
    training run, or a full checkpoint. UsageError when it is none of them, or an adapter without a base.
    """
    folder = Path(required(options, "checkpoint"))
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected an adapter or checkpoint folder, or a run id")
    record = results.read(folder)
    whole = (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file()
    if not whole or (record and record.step is None):  # a run that has not ended, perhaps in the folder of one that has
        unfinished, _ = checkpoints.newest_whole_checkpoint(folder)
        if unfinished is None and record and not whole:
            raise UsageError(f"{folder}: a training run's folder in which no adapter has been saved yet")
        folder = unfinished or folder
    if not (folder / ADAPTER_CONFIG).is_file():
        open_checkpoint(folder).require_sound()
        return folder, None
    record = results.read(folder)
    base = options.model_name_or_path or (record and record.options.get("model_name_or_path"))
    base = base or read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        raise UsageError(
            f"{folder}: an adapter, and its base checkpoint {base or ''} is not here; name it: --model_name_or_path DIR"
        )
    open_checkpoint(base).require_sound()
    return Path(base), folder
