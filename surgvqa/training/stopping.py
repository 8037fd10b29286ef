"""A stop that was asked for: SIGTERM (surgvqa stop, the panel) or Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StopRequested(Exception):
    """Raised between micro steps, where nothing is half done."""


@contextmanager
def stop_on_signals(request: Callable[[], None]) -> Iterator[None]:
    """While entered, the first SIGTERM or Ctrl-C calls `request`, the second ends at once (KeyboardInterrupt).

    `request` runs in a signal handler: it may set a flag and nothing else. The handlers that stood before come back.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    owner, asked = os.getpid(), False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if os.getpid() != owner:  # a data loader's worker, forked with our handlers; its parent ends it
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
