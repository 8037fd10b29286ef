"""Checks dtypes, shapes and completeness of a checkpoint folder, from the headers alone (no torch, no weights).

`--deep` also reads every weight and looks for NaN and infinity; `--fix` writes a BF16 copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from surgvqa.checkpoint.architecture import Shape, compare, expected_tensors
from surgvqa.checkpoint.bf16_copy import write_bf16_copy
from surgvqa.checkpoint.config_json import quantisation, stale_quantisation
from surgvqa.checkpoint.folder import Checkpoint, open_checkpoint
from surgvqa.checkpoint.headers import FLOAT_DTYPES
from surgvqa.config.options import AuditOptions
from surgvqa.config.workspace import Workspace
from surgvqa.errors import UsageError
from surgvqa.machine.packages import TORCH, require_installed
from surgvqa.machine.process import usable_cores
from surgvqa.outcome import Outcome
from surgvqa.terminal.reporter import TerminalReporter

SHOWN = 20  # lines of each list on the terminal; --json has all of them


def check(options: AuditOptions) -> None:
    """Raises SurgvqaError when torch is needed and not installed."""
    if options.deep or options.fix:
        require_installed("audit --deep or --fix", TORCH, "merge")


def run(options: AuditOptions, workspace: Workspace) -> Outcome:
    """Audits a checkpoint. Exit code 1 if a tensor is not BF16, anything is wrong, or --deep finds NaN or infinity."""
    checkpoint = open_checkpoint(options.checkpoint)
    data = audit(checkpoint)
    if options.deep:
        data["not_finite"] = scan(checkpoint)
        data["problems"] += [f"{e['name']}: {e['nan']} NaN, {e['inf']} infinite" for e in data["not_finite"]]
        data["ok"] = data["ok"] and not data["not_finite"]
    if options.fix:
        write_bf16_copy(checkpoint, Path(options.fix))
        data["fixed"] = audit(open_checkpoint(options.fix))
    return Outcome(
        data, ok=data["fixed"]["ok"] if options.fix else data["ok"], show=lambda console: show(console, data)
    )


def audit(checkpoint: Checkpoint) -> dict[str, Any]:
    """`ok`, `tensors`, `parameters`, `bytes`, `dtypes`, `offenders`, `problems`, `architecture`, `missing`, `extra`."""
    tensors = checkpoint.tensors
    offenders = [
        {"name": name, "dtype": t.dtype, "shape": list(t.shape), "shard": t.file.name}
        for name, t in tensors.items()
        if t.dtype != "BF16"
    ]
    problems = list(checkpoint.problems)
    quantised = quantisation(checkpoint)
    if quantised:
        problems.append(f"{checkpoint.folder}: {quantised}")
    expected: dict[str, Shape] = {}
    try:
        expected = expected_tensors(checkpoint)
        problems += compare(expected, tensors)
    except UsageError as error:  # config.json lacks a size
        problems.append(str(error))
    stale = stale_quantisation(checkpoint)
    return {
        "checkpoint": str(checkpoint.folder),
        "ok": not offenders and not problems,
        "tensors": len(tensors),
        "parameters": sum(t.numel for t in tensors.values()),
        "bytes": checkpoint.nbytes,
        "shards": len(checkpoint.files),
        "dtypes": dict(Counter(t.dtype for t in tensors.values()).most_common()),
        "offenders": offenders,
        "problems": problems,
        "warnings": [*checkpoint.warnings, *([stale] if stale else [])],
        "architecture": "audio-grafted Qwen2-VL" if expected else None,
        "missing": sorted(expected.keys() - tensors.keys()),
        "extra": sorted(tensors.keys() - expected.keys()) if expected else [],
    }


# --- reading the weights ---------------------------------------------------------------------------------------------


def scan(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """[{name, nan, inf, shard}] of every float tensor with a non-finite value. Streams the weights, shows progress."""
    import torch

    from surgvqa.checkpoint.shards import BLOCK_BYTES, Files
    from surgvqa.checkpoint.torch_tensors import DTYPES

    floats = {n: t for n, t in checkpoint.tensors.items() if t.dtype in FLOAT_DTYPES}
    blocks = [
        (name, start, min(BLOCK_BYTES, t.nbytes - start))
        for name, t in floats.items()
        for start in range(0, t.nbytes, BLOCK_BYTES)
    ]
    files, threads = Files(), torch.get_num_threads()

    def count(block: tuple[str, int, int]) -> tuple[str, int, int, int]:
        name, start, length = block
        raw = bytearray(length)
        files.read_into(floats[name], start, memoryview(raw))
        value = torch.frombuffer(raw, dtype=DTYPES[floats[name].dtype])
        if value.dtype.itemsize == 1:
            value = value.float()
        if torch.isfinite(value).all():
            return name, length, 0, 0
        return name, length, int(torch.isnan(value).sum()), int(torch.isinf(value).sum())

    nan: Counter[str] = Counter()
    inf: Counter[str] = Counter()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(usable_cores()) as pool, TerminalReporter() as terminal:
            done, total = 0, sum(length for *_, length in blocks)
            terminal.phase("scan", f"{total / 1e9:.2f} GB for NaN and infinity")
            # One window at a time: map() over all blocks would read everything ahead.
            for window in _windows(blocks, 64):
                for name, length, n, i in pool.map(count, window):
                    nan[name] += n
                    inf[name] += i
                    done += length
                    terminal.progress("scan", done, total, "bytes")
    finally:
        torch.set_num_threads(threads)
        files.close()
    bad = [n for n in floats if nan[n] or inf[n]]
    return [{"name": n, "nan": nan[n], "inf": inf[n], "shard": floats[n].file.name} for n in bad]


def _windows(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


# --- for people ------------------------------------------------------------------------------------------------------


def show(console: Any, data: dict[str, Any]) -> None:
    """Prints the audit: architecture, dtypes, then everything that is wrong."""
    from rich.filesize import decimal as human_bytes
    from rich.text import Text

    from surgvqa.terminal.figures import counted

    console.print(
        f"{data['checkpoint']}: {counted(data['tensors'], 'tensor')}, {data['parameters'] / 1e9:.3f} B parameters, "
        f"{human_bytes(data['bytes'])} in {counted(data['shards'], 'shard')}"
        + ("" if data["architecture"] else " (not an audio-grafted Qwen2-VL: completeness not checked)")
    )
    for dtype, count in data["dtypes"].items():
        colour = "green" if dtype == "BF16" else "red"
        console.print(Text.assemble("  ", (f"{dtype:<8}", colour), f" {counted(count, 'tensor')}"))
    for entry in data["offenders"][:SHOWN]:
        text = f"  not BF16: {entry['name']}  {entry['dtype']}  {entry['shape']}  {entry['shard']}"
        console.print(text, style="red", markup=False)
    for text in data["problems"][:SHOWN]:
        console.print(f"  problem: {text}", style="red", markup=False)
    more = max(0, len(data["offenders"]) - SHOWN) + max(0, len(data["problems"]) - SHOWN)
    if more:
        console.print(f"  … and {more} more (--json lists all)")
    for text in data["warnings"]:
        console.print(f"  warning: {text}", style="yellow", markup=False)
    if data["ok"]:
        finite = " and finite" if "not_finite" in data else ""
        console.print(Text.assemble(("ok", "green"), f": every tensor is BF16{finite}"))
    if "fixed" in data:
        console.print(f"BF16 copy: {data['fixed']['checkpoint']}: {'ok' if data['fixed']['ok'] else 'not ok'}")
        for text in data["fixed"]["problems"][:SHOWN]:
            console.print(f"  problem: {text}", style="red", markup=False)
