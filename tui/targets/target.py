"""Where work is done: this machine, or a GPU host (host.py). The screens know a `Target`, not what is behind it.

Jobs are started by the command line itself (`surgvqa train … --detach`), so that the panel and a terminal refuse the
same input with the same words, and a job is never the panel's child.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from surgvqa.config.workspace import Workspace
from surgvqa.runs.history import RunSummary

if TYPE_CHECKING:
    from tui.targets.connection_state import ConnectionState

ACTIVE = ("starting", "running")


@dataclass(frozen=True)
class RunUpdate:
    """What is known of a run, and what is new in it since the last look."""

    info: dict[str, Any]
    """run.json."""
    state: str
    """starting, running, finished, failed, stopped, died or unknown."""
    earlier: list[dict[str, Any]]
    """Once, before the first events: `metric` and `eval` of the runs that this one goes on from, the oldest first."""
    events: list[dict[str, Any]]
    lines: list[str]
    """Of the log."""
    problem: str = ""
    """Why the run cannot be followed at the moment."""
    damage: str = ""
    """What could not be read of its files; the rest was."""
    more: bool = False
    """Whether there is more to read at once: no look takes in all of a long run, so that memory stays bounded."""


class Feed(Protocol):
    """One run, followed from its first event and the end of its log."""

    def read(self) -> RunUpdate:
        """What is new since the last call. May read files: call it in a thread."""
        ...

    def close(self) -> None:
        """Nobody reads any more."""
        ...


class Target(Protocol):
    """A machine on which jobs run. Methods that are not async may block: call them in a thread.

    `workspace` is always the one here; a host has its own folder that `surgvqa-remote upload` fills from it.
    """

    name: str
    workspace: Workspace

    @property
    def connection(self) -> ConnectionState | None:
        """How it stands with the connection; None for this machine."""
        ...

    @property
    def price_per_hour(self) -> float | None:
        """US dollars; None where it is not known, or nothing is paid."""
        ...

    def runs(self) -> list[RunSummary]:
        """All runs, newest first."""
        ...

    def feed(self, run_id: str) -> Feed:
        """Follows a run."""
        ...

    def stop(self, run_id: str) -> str:
        """Ends a run (up to 30 s) and returns its state."""
        ...

    async def launch(self, *argv: str, share: bool = False) -> str:
        """Starts a job and returns its run id; raises SurgvqaError with the command's own line.

        `share`: also when another job has the GPU.
        """
        ...

    async def resume(self, run_id: str, *changes: str, share: bool = False) -> str:
        """Goes on with a training from its last checkpoint, with other settings where `changes` names them."""
        ...


def newest_running(listed: list[RunSummary], *commands: str) -> RunSummary | None:
    """The newest run that is still going, of these commands or of any."""
    return next((r for r in listed if r.state in ACTIVE and (not commands or r.command in commands)), None)
