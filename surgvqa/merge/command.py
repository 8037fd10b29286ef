"""Merges LoRA adapters and a checkpoint into one full BF16 checkpoint, tensor by tensor.

The plan is made from the headers alone. It says for each tensor of the output where its bytes come from (copied, cast,
merged, replaced). `writer` then streams the tensors to disk, and `arithmetic` computes them. Memory does not grow with
the checkpoint: it holds a few blocks of 4 MB and the factors of the current modules.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.filesize import decimal as human_bytes

from surgvqa.checkpoint.folder import as_on_disk, parse_size
from surgvqa.checkpoint.writer import Writer
from surgvqa.config.options import MergeOptions
from surgvqa.errors import UsageError
from surgvqa.machine.process import peak_rss_bytes
from surgvqa.merge.plan import REPORT_FILE, Plan, make_plan
from surgvqa.merge.report import make_report, show_report
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run
from surgvqa.terminal.figures import counted


def check(options: MergeOptions) -> None:
    """Checks the folders and the shard size before a run folder is made. Raises UsageError."""
    parse_size(options.max_shard_size)
    for name in ("stage1_model_path", "stage2_adapter_path"):
        if not as_on_disk(Path(getattr(options, name))).is_dir():
            raise UsageError(f"--{name} {getattr(options, name)}: no such folder")
    if options.projector and not Path(options.projector).is_file():
        raise UsageError(f"--projector {options.projector}: no such file")


def run(options: MergeOptions, run: Run) -> Outcome:
    """Merges; with --dry_run it only shows the plan."""
    began = time.monotonic()
    run.phase("plan", f"{options.stage1_model_path} + {options.stage2_adapter_path}")
    plan = make_plan(options)
    run.emit("plan", **plan.summary())
    for warning in plan.warnings:
        run.warning(warning)
    if options.dry_run:
        return _dry_run(plan)

    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)  # blocks are computed in parallel, each by one worker thread
    torch.set_float32_matmul_precision(
        "highest"
    )  # no TF32: the errors of its 10-bit mantissa would survive the rounding
    seconds = {"plan": time.monotonic() - began}
    try:
        with Writer(plan.checkpoint, run) as writer:
            seconds["verify"] = time.monotonic() - began - sum(seconds.values())
            if writer.finished:
                return _unchanged(plan, writer, time.monotonic() - began)
            size = f"{counted(len(plan.checkpoint.shards), 'shard')}, {human_bytes(plan.checkpoint.nbytes)}"
            run.phase("merge", f"{size} on {plan.device}")
            writer.write_shards()
            seconds["merge"] = time.monotonic() - began - sum(seconds.values())
            run.phase("publish", str(plan.checkpoint.output))
            report = make_report(plan, writer, seconds, peak_rss_bytes())
            for text in report["warnings"][len(plan.warnings) :]:
                run.warning(text)
            writer.publish(report)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        plan.files.close()
    return _outcome(plan, report, time.monotonic() - began)


def _dry_run(plan: Plan) -> Outcome:
    data = {**plan.summary(), "dry_run": True, "warnings": plan.warnings}
    fits = data["output_bytes"] <= data["free_bytes"]

    def show(console: Any) -> None:
        from rich.text import Text

        console.print(f"{data['output']}: {counted(len(data['shards']), 'shard')}, {human_bytes(data['output_bytes'])}")
        for shard in data["shards"]:
            tensors = counted(shard["tensors"], "tensor")
            console.print(f"  {shard['file']}  {human_bytes(shard['bytes'])}  {tensors}")
        console.print(
            f"{counted(data['modules_merged'], 'module')} merged, {counted(data['tensors_replaced'], 'tensor')} "
            f"replaced, {data['tensors_cast']} cast, {data['tensors_copied']} copied, on {plan.device}"
        )
        console.print(f"free disk {human_bytes(data['free_bytes'])}: {'enough' if fits else 'not enough'}")
        for text in plan.warnings:
            console.print(Text.assemble(("warning:", "yellow"), f" {text}"))

    return Outcome(data, ok=fits, show=show)


def _unchanged(plan: Plan, writer: Writer, seconds: float) -> Outcome:
    report = writer.record
    data = {**_data(plan, report, seconds), "already_there": True}
    return Outcome(
        data,
        show=lambda console: console.print(f"{plan.checkpoint.output}: already merged from these inputs; verified"),
    )


def _data(plan: Plan, report: dict[str, Any], seconds: float) -> dict[str, Any]:
    return {
        "output": str(plan.checkpoint.output),
        "modules_merged": report["modules_merged"],
        "tensors_copied": report["tensors_copied"],
        "seconds": round(seconds, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "warnings": report["warnings"],
        "shards": len(plan.checkpoint.shards),
        "bytes": plan.checkpoint.nbytes,
        "report": str(plan.checkpoint.output / REPORT_FILE),
    }


def _outcome(plan: Plan, report: dict[str, Any], seconds: float) -> Outcome:
    data = _data(plan, report, seconds)
    return Outcome(data, ok=not report["not_finite"], show=lambda console: show_report(console, data, report))
