"""Draws the panel over a workspace into SVGs, without a terminal, and writes the table of its keys: `make screenshots`,
after a `make demo`. Monitor shows the recorded GPU run of the demo, unless --run names another."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from textual.pilot import Pilot

from surgvqa.config.workspace import load_workspace
from surgvqa.errors import SurgvqaError
from tui import keys
from tui.app import Panel
from tui.screens.monitor import MonitorScreen
from tui.targets.local import LocalTarget
from tui.targets.recording import RUN_ID, DemoTarget
from tui.widgets.head import TITLES

DOCS = Path(__file__).parent
OUT = DOCS / "panel.svg"
INTO_RECORDING_S = 10.0
KEYS_HEAD = """# The keys of the panel

Made by `make screenshots` from the panel's one table (`tui/keys.py`), which its footer, help and palette are made from
too. A key is remapped in `~/.config/surgvqa/keys.toml`, by its name:

```toml
[monitor]
stop = "ctrl+s"
```

"""


def screenshot(
    workspace: Path, out: Path, mode: str, size: tuple[int, int], wait_s: float, run: str | None = None
) -> None:
    """Opens the panel on `workspace`, waits until its figures are read, and saves what it shows. In Monitor that is
    `run`, else the newest training."""
    target: LocalTarget = LocalTarget(load_workspace(workspace))
    if run == RUN_ID:
        target = DemoTarget(target.workspace)
        target.began = time.time() - INTO_RECORDING_S
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
    parser.add_argument("--all", action="store_true", help="every screen, into docs/, and docs/keys.md")
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
        if arguments.all:
            (DOCS / "keys.md").write_text(KEYS_HEAD + keys.markdown(), encoding="utf-8")
            for mode in TITLES:
                out = OUT if mode == "monitor" else DOCS / f"panel-{mode}.svg"
                screenshot(arguments.workspace, out, mode, size, arguments.wait, arguments.run or RUN_ID)
        else:
            screenshot(arguments.workspace, arguments.out, arguments.screen, size, arguments.wait, arguments.run)
    except (SurgvqaError, OSError) as error:
        print(f"screenshot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
