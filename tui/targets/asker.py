"""`surgvqa ask --interactive` beside the panel: the model stays loaded in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgvqa.errors import SurgvqaError
from surgvqa.untrusted import one_line, parse_object

PROGRAM = (sys.executable, "-m", "surgvqa")
LONGEST_LINE = 1 << 20
"""Bytes of a reply, at most."""


class Asker:
    """One process, asked one question at a time. `end` it: nothing else does."""

    def __init__(self, arguments: Sequence[str], folder: Path):
        self.arguments, self.folder = list(arguments), folder
        self._process: asyncio.subprocess.Process | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> dict[str, Any]:
        """Loads the model; what the process says of it. Raises SurgvqaError with its own words when it ends instead."""
        self._process = await asyncio.create_subprocess_exec(
            *PROGRAM,
            "ask",
            "--interactive",
            *self.arguments,
            cwd=self.folder,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._errors,
            limit=LONGEST_LINE,
            start_new_session=True,
        )
        return await self._reply()

    async def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request (surgvqa/evaluation/interactive.py). Raises SurgvqaError for an error in it, and when
        the process has ended."""
        assert self._process and self._process.stdin
        with contextlib.suppress(ConnectionError):  # its end is told by what follows
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            await self._process.stdin.drain()
        reply = await self._reply()
        if "error" in reply:
            raise SurgvqaError(str(reply["error"]))
        return reply

    async def _reply(self) -> dict[str, Any]:
        assert self._process and self._process.stdout
        try:
            line = await self._process.stdout.readline()
            if line:
                return parse_object(line)
        except ValueError as error:
            self.end()
            raise SurgvqaError(f"surgvqa ask said what is no reply: {error}") from None
        await self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        raise SurgvqaError(one_line(said[-1]) if said else f"surgvqa ask ended ({self._process.returncode})")

    def end(self) -> None:
        """Ends the process; its memory is free again."""
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
