"""Requested stops: SIGTERM (surgvqa stop, the panel) or Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StopRequested(Exception):
    """Raised between micro steps, where no work is interrupted."""


@contextmanager
def stop_on_signals(request: Callable[[], None]) -> Iterator[None]:
    """Inside the context, the first SIGTERM or Ctrl-C calls `request`, and the second raises KeyboardInterrupt.

    `request` runs in a signal handler, so it may only set a flag. Restores the earlier handlers.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    owner, asked = os.getpid(), False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if os.getpid() != owner:  # a data loader's worker, forked with our handlers, which its parent ends
            if number == signal.SIGTERM:
                os._exit(0)
            return
        if asked:
            raise KeyboardInterrupt
        asked = True
        request()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
