"""Runs work in threads with a progress bar on the terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")
R = TypeVar("R")


def in_threads(work: Callable[[T], R], items: Collection[T], title: str) -> Iterator[R]:
    """Yields `work` of each item, in order. Uses one thread per core, and a bar if stderr is a terminal.

    For work that releases the interpreter lock. After an error or Ctrl-C no more items are started.
    """
    terminal = Console(stderr=True)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from track(
            pool.map(work, items),
            title,
            total=len(items),
            console=terminal,
            transient=True,
            disable=not terminal.is_terminal,
        )
    finally:
        pool.shutdown(cancel_futures=True)
