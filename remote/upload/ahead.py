"""An upload's first questions, asked while the program is still being loaded and the files are looked at.

An OpenSSH process brings the answers, and the agent at its other end answers the rest of the upload's questions too, so
paramiko, which takes a third of a second to load and connect, is needed only for more than that. Most often nothing has
changed since the last upload to a host; then these questions are all that there is to ask. Any failure here is ignored:
the same questions are asked again through paramiko, which reports the cause.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remote.ssh.answers import checked
from remote.ssh.hosts import Host, resolve
from remote.ssh.process import AgentProcess
from remote.upload.remembered import known_offers
from surgvqa.config.workspace import find_workspace
from surgvqa.errors import SurgvqaError

SPEAKS_IN_S = 20.0
"""Seconds that the host has to speak: longer than most login shells take, and than ssh takes to give up a dead host."""
OTHERWISE = ("--workspace", "--checksum", "--detach", "--help", "-h")
"""Options with which nothing is asked before the command line is understood."""
_started: dict[tuple[str, Path], Ahead] = {}


class Ahead:
    """Questions to a host: what it is, and, after an earlier upload, whether that one's items are still there."""

    def __init__(self, host: Host, ask: bool = True):
        self.host = host
        self.offers = known_offers(host.name)
        """What the host was told of these items."""
        self._questions: dict[str, dict[str, Any]] = {"probe": {"venv": host.entry.venv}}
        if self.offers:
            self._questions["known"] = {"items": self.offers}
        self._process: AgentProcess | None = None
        if ask:
            with contextlib.suppress(OSError):
                self._process = AgentProcess(host, None, self._questions)

    def answers(self) -> tuple[AgentProcess, Iterator[dict[str, Any]], dict[str, dict[str, Any]]] | None:
        """The agent, its answers to all further questions, and its answers to those asked here, by operation."""
        if self._process is None:
            return None
        try:
            heard = self._process.answers(SPEAKS_IN_S)
            found = {op: checked(self.host, op, asked, next(heard)) for op, asked in self._questions.items()}
        except (SurgvqaError, StopIteration, OSError):
            self.close()
            return None
        return self._process, heard, found

    def close(self) -> None:
        """Ends the process."""
        if self._process:
            self._process.discard()
            self._process = None


def start(words: list[str]) -> None:
    """Asks, where the words behind `upload` say whom. What is wrong with them is said when they are read."""
    options = [word.partition("=")[0].replace("_", "-") for word in words]
    if not words or words[0].startswith("-") or set(options) & set(OTHERWISE):
        return
    with contextlib.suppress(SurgvqaError, OSError):
        root = find_workspace()
        _started[words[0], root] = Ahead(resolve(words[0], root))


def to(name: str, root: Path, ask: bool) -> Ahead:
    """The questions to the host of that name: those that were asked at the start, or new ones."""
    return _started.pop((name, root), None) or Ahead(resolve(name, root), ask)
