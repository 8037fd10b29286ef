"""Blocking work beside the panel: in threads, with its result or its error."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from tui.targets.connection_state import Detached

Result = TypeVar("Result")


async def in_thread(work: Callable[..., Result], *arguments: Any) -> Result:
    """Runs blocking work in a thread of its own.

    Unlike `asyncio.to_thread` it takes no place in a pool that others wait for, and never holds up the panel's end.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(put: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            put(value)

    def run() -> None:
        try:
            done: tuple[Callable[[Any], None], Any] = future.set_result, work(*arguments)
        except BaseException as error:
            done = future.set_exception, error
        with contextlib.suppress(RuntimeError):  # the panel was closed meanwhile
            loop.call_soon_threadsafe(settle, *done)

    threading.Thread(target=run, daemon=True).start()
    return await future


class LineReporter:
    """What remote's planner and fetch tell of themselves, as one line; they end when it is not `wanted` any more."""

    def __init__(self) -> None:
        self.text, self.wanted = "", True
        self.share: float | None = None

    @property
    def line(self) -> str:
        return self.text if self.share is None else f"{self.text}  {100 * self.share:.0f} %"

    def emit(self, kind: str, **fields: Any) -> None:
        """What is neither a phase nor progress is not shown."""

    def phase(self, name: str, text: str = "") -> None:
        self._tell(f"{name}  {text}", None)

    def progress(self, phase: str, done: float, total: float | None, unit: str, **_: Any) -> None:
        self._tell(self.text, done / total if total else None)

    def warning(self, text: str) -> None:
        self._tell(text, None)

    def _tell(self, text: str, share: float | None) -> None:
        if not self.wanted:
            raise Detached("not wanted any more")
        self.text, self.share = text, share


async def watched(work: Callable[[LineReporter], Result], show: Callable[[str], object]) -> Result:
    """Runs `work` in a thread of its own and shows meanwhile how far it is; cancelled, it ends soon."""
    progress = LineReporter()
    working = asyncio.ensure_future(in_thread(work, progress))
    try:
        while not (await asyncio.wait({working}, timeout=0.3))[0]:
            show(progress.line)
    finally:
        progress.wanted = False
    return working.result()
