"""`surgvqa-tui`: opens the panel in a workspace."""

from __future__ import annotations

import argparse
import contextlib
import logging
import subprocess
import sys
from pathlib import Path

from presets import PresetError
from surgvqa import __version__
from surgvqa.cli.completion import add_completion
from surgvqa.cli.parser import Parser
from surgvqa.config.workspace import WORKSPACE_FILE, Workspace, find_workspace, load_workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.files import user_folder
from tui import log
from tui.app import OPEN_DEMO, Panel
from tui.keys import keys_file, read_keymap
from tui.preferences import GIVE_TITLE_BACK, preferences_file, read_preferences
from tui.targets.local import LocalTarget
from tui.targets.recording import DemoTarget
from tui.textual_internals import crash_of, survive_lost_terminal


def build_parser() -> argparse.ArgumentParser:
    """The command line of the panel."""
    parser = Parser(
        prog="surgvqa-tui",
        description="The panel: merge, upload, train and monitor. Closing it never harms a running job.",
        epilog="example: surgvqa-tui --demo",
    )
    parser.add_argument("--version", action="version", version=f"surgvqa-tui {__version__}")
    parser.add_argument(
        "--demo", action="store_true", help="open the demo workspace; make it in ./demo when it is not there"
    )
    parser.add_argument(
        "--workspace", metavar="DIR", help="workspace folder (default: the nearest one with a surgvqa.toml)"
    )
    add_completion(parser)
    parser.add_argument("--host", metavar="NAME", help="GPU host: a name of ~/.ssh/config or hosts.toml")
    return parser


def open_workspace(arguments: argparse.Namespace) -> Workspace:
    """The workspace that the command line means; --demo makes it first. Raises SurgvqaError."""
    if arguments.demo:
        root = Path(arguments.workspace or "demo")
        if not (root / WORKSPACE_FILE).is_file():
            made = subprocess.run([sys.executable, "-m", "surgvqa", "demo", str(root)], check=False)
            if made.returncode:
                raise SurgvqaError(f"the demo workspace could not be made in {root}")
    elif arguments.workspace:
        root = Path(arguments.workspace)
        if not root.is_dir():
            raise UsageError(f"--workspace {root}: no such folder")
    else:
        root = find_workspace()
    return load_workspace(root)


def theme_file() -> Path:
    """Where the chosen theme is kept."""
    return user_folder("config") / "theme"


def main(argv: list[str] | None = None) -> int:
    """Runs the panel; 0 when it was closed, 2 when it could not be opened."""
    try:
        arguments = build_parser().parse_args(argv)
        workspace = open_workspace(arguments)
        panel = Panel(
            DemoTarget(workspace) if arguments.demo else LocalTarget(workspace),
            arguments.host or workspace.value("host"),
            theme_file(),
            read_preferences(preferences_file()),
            read_keymap(keys_file()),
        )
    except (SurgvqaError, PresetError) as error:
        print(f"surgvqa-tui: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    if not (sys.stdin.isatty() and sys.stderr.isatty()):  # Textual draws on stderr
        print("surgvqa-tui: needs a terminal; surgvqa runs and surgvqa follow work without one", file=sys.stderr)
        return 2
    with contextlib.suppress(OSError):  # the panel works without its log
        log.write_to(log.default_path())
    survive_lost_terminal()
    panel.run()
    if panel.preferences.title:
        with contextlib.suppress(OSError):  # the terminal is gone
            print(GIVE_TITLE_BACK, end="", file=sys.stderr, flush=True)
    if panel.return_code == OPEN_DEMO:
        return main(["--demo", "--workspace", str(workspace.root / "demo")])
    crash = crash_of(panel)
    if crash is not None:
        logging.getLogger("tui").error("the panel crashed", exc_info=crash)
        report = f"; the report is in {log.path}" if log.path else ""
        print(f"surgvqa-tui: the panel crashed: {type(crash).__name__}{report}", file=sys.stderr)
    return 0 if panel.return_code is None else panel.return_code


if __name__ == "__main__":
    sys.exit(main())
