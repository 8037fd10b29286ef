"""An upload's first questions, asked while the program is still being loaded and the files are looked at.

Most often nothing has changed since the last upload to a host. Then these questions are all that there is to ask: an
OpenSSH process brings the answers by the time that this side knows what it has itself, and nothing of paramiko's is
loaded. Whatever goes wrong here counts for nothing: the same is asked over an ordinary connection, which says what the
matter is.
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
    """Two questions to a host: what it is, and whether the items of the last upload are still there. None is asked
    where there was no upload before."""

    def __init__(self, host: Host, ask: bool = True):
        self.host = host
        self.offers = known_offers(host.name)
        """What the host was told of these items."""
        self._questions: dict[str, dict[str, Any]] = {
            "probe": {"venv": host.entry.venv},
            "known": {"items": self.offers},
        }
        self._process: AgentProcess | None = None
        if ask and self.offers:
            with contextlib.suppress(OSError):
                self._process = AgentProcess(host, None, self._questions)

    def answers(self) -> tuple[AgentProcess, Iterator[dict[str, Any]], dict[str, Any], dict[str, Any]] | None:
        """The agent, its answers to what it is asked from now on, what the host is, and what it says of the items."""
        if self._process is None:
            return None
        try:
            heard = self._process.answers(SPEAKS_IN_S)
            facts, known = (checked(self.host, op, asked, next(heard)) for op, asked in self._questions.items())
        except (SurgvqaError, StopIteration, OSError):
            self.close()
            return None
        return self._process, heard, facts, known

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
        if known_offers(words[0]):
            _started[words[0], root] = Ahead(resolve(words[0], root))


def to(name: str, root: Path, ask: bool) -> Ahead:
    """The questions to the host of that name: those that were asked at the start, or new ones."""
    return _started.pop((name, root), None) or Ahead(resolve(name, root), ask)
