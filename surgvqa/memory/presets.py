"""`surgvqa presets`: the presets with their predicted peaks."""

from __future__ import annotations

from argparse import Namespace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from presets import load_presets
from surgvqa.config.resolve import resolve
from surgvqa.config.workspace import Workspace
from surgvqa.outcome import Outcome
from surgvqa.terminal.drawing import bar


def presets(arguments: Namespace, workspace: Workspace) -> Outcome:
    """Lists every preset: its settings, their reason, what it gives up, and its predicted peak against the budget."""
    # Imported here, because it takes a quarter of every command's start-up time.
    from surgvqa.memory.budget import check, preset_peaks, with_preset

    listed = load_presets(workspace.root)
    options = resolve("budget", {}, workspace).options
    check(options)
    peaks = preset_peaks(options, listed)
    budgets = {p.name: with_preset(options, p).budget_gb for p in listed}
    data = {
        "budget_gb": options.budget_gb,
        "presets": [
            {
                "name": p.name,
                "reason": p.reason,
                "gives_up": p.gives_up,
                "rung": p.rung,
                "settings": p.settings,
                "predicted_peak_gb": peaks[p.name],
                "fits": peaks[p.name] <= budgets[p.name],
            }
            for p in listed
        ],
    }

    def show(console: Console) -> None:
        table = Table("preset", f"GB of {options.budget_gb:g}", "why it is, and what it gives up", box=None)
        table.columns[0].no_wrap = table.columns[1].no_wrap = True
        for p in listed:
            sets = Text("\n".join(f"  {k}={v}" for k, v in p.settings.items()), "dim")
            name = Text.assemble((p.name, "bold"), "" if p.rung is None else f"  rung {p.rung}", "\n", sets)
            peak = Text.assemble(bar(peaks[p.name] / budgets[p.name], 10), f" {peaks[p.name]:.1f}")
            table.add_row(name, peak, Text.assemble(p.reason, ("\ngives up: ", "dim"), p.gives_up))
        console.print(table)

    return Outcome(data, show=show)
