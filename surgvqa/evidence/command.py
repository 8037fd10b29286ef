"""`surgvqa evidence`: packs runs into a folder that can be checked, or checks one. Light to import."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from surgvqa.config.options import EvidenceOptions
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.evidence.card import card
from surgvqa.evidence.check import BROKEN, check_evidence
from surgvqa.evidence.pack import collect, write
from surgvqa.machine.packages import require_installed
from surgvqa.outcome import Outcome
from surgvqa.runs.history import find_run

COLOURS = {"same": "green", "not here": "yellow", **dict.fromkeys(BROKEN, "red")}


def check(options: EvidenceOptions) -> None:
    """Raises UsageError for missing or contradictory arguments, and for an output that exists or has no folder."""
    if options.check:
        if options.runs:
            raise UsageError("--check reads a folder of evidence; leave the runs out")
        return
    if not options.runs:
        raise UsageError("evidence takes runs (surgvqa runs lists them), or --check DIR")
    if Path(options.output).exists():
        raise UsageError(f"output: {options.output} already exists; name another folder, or remove it")
    if not Path(options.output).absolute().parent.is_dir():
        raise UsageError(f"output: {Path(options.output).absolute().parent}: no such folder")
    require_installed("evidence", ["huggingface_hub"], "hub")


def run(options: EvidenceOptions, workspace: Workspace) -> Outcome:
    """Packs or checks evidence. Exit code 1 when something no longer matches."""
    return _check(Path(options.check)) if options.check else _pack(options, workspace)


def _pack(options: EvidenceOptions, workspace: Workspace) -> Outcome:
    folders = list(dict.fromkeys(find_run(name, workspace.runs_dirs) for name in options.runs or ()))
    found = collect(folders, options.eval_data_path, options.train_data_path)
    output = Path(options.output).absolute()
    beside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        write(found, card(found), beside)
        os.rename(beside, output)
    except OSError as error:
        raise SurgvqaError(f"{output}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    data = {
        "output": str(output),
        "runs": [run["id"] for run in found.runs],
        "scores": found.scores,
        "notes": found.notes,
    }

    def show(console: Any) -> None:
        from surgvqa.terminal.drawing import plain

        console.print(plain(f"{output}: {len(found.runs)} runs, card in README.md"))
        for note in found.notes:
            console.print(plain(f"  {note}"), style="yellow")

    return Outcome(data, show=show)


def _check(folder: Path) -> Outcome:
    findings = check_evidence(folder)
    broken = [finding for finding in findings if finding.state in BROKEN]

    def show(console: Any) -> None:
        from surgvqa.terminal.drawing import plain

        for finding in findings:
            text = plain(f"{finding.state:>10}  {finding.what}" + (f"  ({finding.detail})" if finding.detail else ""))
            text.stylize(COLOURS[finding.state], 0, 10)
            console.print(text, soft_wrap=True)
        away = sum(finding.state == "not here" for finding in findings)
        verdict = f"{len(broken)} of {len(findings)} no longer match" if broken else f"all {len(findings) - away} match"
        console.print(
            verdict + (f"; {away} are not on this machine" if away else ""), style="red" if broken else "green"
        )

    return Outcome({"ok": not broken, "checks": [vars(finding) for finding in findings]}, not broken, show)
