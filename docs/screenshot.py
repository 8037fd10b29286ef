"""Draws the panel over a workspace into an SVG, without a terminal: `make screenshot`, after a `make demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from textual.pilot import Pilot

from surgvqa.config.workspace import load_workspace
from surgvqa.errors import SurgvqaError
from tui.app import Panel
from tui.screens.monitor import MonitorScreen
from tui.targets.local import LocalTarget
from tui.widgets.head import TITLES

OUT = Path(__file__).with_name("panel.svg")


def screenshot(
    workspace: Path, out: Path, mode: str, size: tuple[int, int], wait_s: float, run: str | None = None
) -> None:
    """Opens the panel on `workspace`, waits until its figures are read, and saves what it shows. In Monitor that is
    `run`, else the newest training."""
    target = LocalTarget(load_workspace(workspace))
    run = run or next((found.id for found in target.runs() if found.command == "train"), None)
    panel = Panel(target)

    async def save(pilot: Pilot[None]) -> None:
        await pilot.pause(wait_s)
        await panel.action_go(mode)
        await pilot.pause()
        screen = panel.screen
        if run and isinstance(screen, MonitorScreen):
            screen.attach(run)
            while not (screen.follower and screen.follower.model.events):
                await pilot.pause(0.1)
        await pilot.pause(wait_s)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(panel.export_screenshot(title="surgvqa-tui"), encoding="utf-8")
        panel.exit()

    panel.run(headless=True, size=size, auto_pilot=save)


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 when the file is written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "workspace", type=Path, nargs="?", default=Path("demo"), help="workspace folder (default: demo)"
    )
    parser.add_argument("out", type=Path, nargs="?", default=OUT, help="SVG file to write (default: docs/panel.svg)")
    parser.add_argument("--screen", choices=tuple(TITLES), default="monitor")
    parser.add_argument("--run", help="run that Monitor shows (default: the newest training)")
    parser.add_argument("--size", default="120x36", help="columns x rows (default: 120x36)")
    parser.add_argument("--wait", type=float, default=3.0, help="seconds to let the screen fill (default: 3)")
    arguments = parser.parse_args(argv)
    if not arguments.workspace.is_dir():
        parser.error(f"{arguments.workspace}: no such folder; make demo makes one")
    columns, _, rows = arguments.size.partition("x")
    try:
        size = int(columns), int(rows)
        screenshot(arguments.workspace, arguments.out, arguments.screen, size, arguments.wait, arguments.run)
    except (SurgvqaError, OSError) as error:
        print(f"screenshot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
