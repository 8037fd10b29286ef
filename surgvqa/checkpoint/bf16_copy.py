"""A BF16 copy of a checkpoint in another float type (`surgvqa audit --fix`)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from surgvqa.checkpoint.config_json import quantisation
from surgvqa.checkpoint.folder import Checkpoint
from surgvqa.checkpoint.headers import FLOAT_DTYPES
from surgvqa.errors import UsageError
from surgvqa.terminal.reporter import TerminalReporter

FIX_REPORT_FILE = "bf16_copy_report.json"


def write_bf16_copy(checkpoint: Checkpoint, output: Path) -> None:
    """Writes every float tensor as BF16 to `output`, streamed and resumable like a merge.

    Raises UsageError for a checkpoint that is damaged, incomplete or quantised, because rounding cannot repair those.
    """
    from surgvqa.checkpoint.config_json import output_config, side_files
    from surgvqa.checkpoint.shards import Copy, Files, Source, plan_shards
    from surgvqa.checkpoint.torch_tensors import Cast
    from surgvqa.checkpoint.writer import NewCheckpoint, Writer, file_identity

    quantised = quantisation(checkpoint)
    if quantised:
        raise UsageError(f"{checkpoint.folder}: {quantised}; a BF16 copy would not restore the original weights")
    checkpoint.require_sound()
    if output.resolve() == checkpoint.folder.resolve():
        raise UsageError(f"--fix {output}: is the checkpoint itself; name another folder")
    files = Files()
    sources: list[Source] = [
        Cast(name, t, files) if t.dtype in FLOAT_DTYPES and t.dtype != "BF16" else Copy(name, t, files)
        for name, t in checkpoint.tensors.items()
    ]
    new = NewCheckpoint(
        output=output,
        shards=plan_shards(sources, 5 * 10**9),
        inputs={f.name: file_identity(f) for f in [*checkpoint.files, checkpoint.folder / "config.json"]},
        report_file=FIX_REPORT_FILE,
        side_files=side_files(checkpoint, output_config(checkpoint)),
    )
    try:
        with TerminalReporter() as terminal, Writer(new, terminal) as writer:
            if not writer.finished:
                terminal.phase("merge", f"{len(new.shards)} shards, {new.nbytes / 1e9:.2f} GB")
                writer.write_shards()
                writer.publish({"dtypes_before": dict(Counter(t.dtype for t in checkpoint.tensors.values()))})
    finally:
        files.close()
