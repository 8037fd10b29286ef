"""`surgvqa-remote disk HOST`: what lies on the host's disk, and the removal of what is ours."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal as human_bytes
from rich.table import Table

from remote.cli.commands import connect_to
from surgvqa.config.workspace import Workspace
from surgvqa.errors import UsageError
from surgvqa.outcome import Outcome
from surgvqa.terminal.drawing import plain
from surgvqa.terminal.figures import counted, human_seconds

if TYPE_CHECKING:
    from remote.ssh.connection import Remote


def disk(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Lists what lies there; with --clean removes what is named, after a question or with --yes."""
    with connect_to(arguments, workspace) as remote:
        venv = remote.host.entry.venv
        found = remote.call("disk", venv=venv)
        data = {"host": arguments.host, **found, "cleaned": [], "cleaned_bytes": 0}
        if arguments.clean:
            _require_consent(arguments, found)
            data |= clean(remote, arguments.clean)
            data |= remote.call("disk", venv=venv)
    return Outcome(data, show=lambda console: _show(console, data))


def clean(remote: Remote, names: list[str]) -> dict[str, Any]:
    """Removes what is named: {"cleaned": names, "cleaned_bytes"}."""
    again = False

    def attempt() -> dict[str, Any]:
        nonlocal again
        answer = {}
        params = {"venv": remote.host.entry.venv, "names": names, "again": again}
        again = True
        for message in remote.stream("clean", **params):
            answer = message
        return answer

    return remote.patiently(attempt)


def _require_consent(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """UsageError where nobody has said yes."""
    if arguments.yes:
        return
    names = ", ".join(arguments.clean)
    if arguments.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{names}: removed only with --yes where nobody can be asked")
    _show(Console(stderr=True, highlight=False), {**found, "host": arguments.host, "cleaned": []})
    sys.stderr.write(f"remove {names} from {arguments.host}? It cannot be taken back. [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was removed")


def _show(console: Console, data: dict[str, Any]) -> None:
    table = Table("name", "what", "size", "changed", "", box=None)
    for column in table.columns[:3]:
        column.no_wrap = True  # they are there to be typed
    for row in data["entries"]:
        age = "" if row["age_s"] is None else f"{human_seconds(row['age_s'])} ago"
        used = f"in use by {row['in_use']}" if row["in_use"] else ""
        note = "; ".join(part for part in (used, row["note"], "" if row["ours"] else "kept") if part)
        table.add_row(*map(plain, (row["name"], row["kind"], human_bytes(row["bytes"]), age, note)))
    console.print(table if data["entries"] else plain(f"nothing in {data['workspace']}"))
    if data["more"]:
        console.print(plain(f"and {counted(data['more'], 'smaller entry')} more"))
    if not data["complete"]:
        console.print("there is more than could be looked at in a minute: the sizes are lower bounds")
    if data["cleaned"]:
        console.print(plain(f"removed: {', '.join(data['cleaned'])}, {human_bytes(data['cleaned_bytes'])}"))
    free, total = human_bytes(data["free_bytes"]), human_bytes(data["total_bytes"])
    console.print(plain(f"{data['host']}: {free} of {total} free where {data['workspace']} lies"))
