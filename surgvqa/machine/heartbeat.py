"""Ranks on several machines: each says every few seconds that it is there, and events travel to rank 0.

Of a process on another machine nothing can be seen, and a machine that loses its power or its network closes no
connection. So silence tells: the store that torchrun starts is on the first machine, and each rank writes into it.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

BEAT_S = 2.0
SILENT_S = 60.0
"""Seconds without a word of it after which a machine counts as lost."""
MOST_WAITING = 10_000
"""Events that wait to travel; later ones are only in the rank's own folder."""
Emit = Callable[..., None]


class PatientStore:
    """A torch.distributed Store whose machine may vanish: RuntimeError after SILENT_S in place of waiting for TCP,
    which takes a quarter of an hour. Only for waits of less than that."""

    def __init__(self, store: Any):
        self._store = store
        self._asked: queue.SimpleQueue[tuple[str, tuple[Any, ...], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        self._gone = False
        threading.Thread(target=self._answer, name="store", daemon=True).start()

    def _answer(self) -> None:
        while True:
            name, arguments, found = self._asked.get()
            try:
                found.put((getattr(self._store, name)(*arguments), None))
            except Exception as error:  # of the asking thread
                found.put((None, error))

    def _ask(self, name: str, *arguments: Any) -> Any:
        found: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if not self._gone:
            self._asked.put((name, arguments, found))
        try:
            value, error = found.get(timeout=0 if self._gone else SILENT_S)
        except queue.Empty:
            self._gone = True
            raise RuntimeError("the store does not answer") from None
        if error is not None:
            raise error
        return value

    def set(self, key: str, value: str) -> None:
        self._ask("set", key, value)

    def get(self, key: str) -> bytes:
        return bytes(self._ask("get", key))

    def check(self, keys: list[str]) -> bool:
        return bool(self._ask("check", keys))

    def wait(self, keys: list[str], timeout: Any) -> None:
        self._ask("wait", keys, timeout)

    def delete_key(self, key: str) -> bool:
        return bool(self._ask("delete_key", key))


class Heartbeat:
    """A thread with a connection of its own to the store (`store`)."""

    def __init__(self, store: Any, rank: int, far: Collection[int]):
        """`far`: the ranks on other machines."""
        self.store, self.rank, self.far = store, rank, sorted(far)
        self.emit: Emit | None = None
        """On rank 0: where the events of the others go."""
        self._heard = dict.fromkeys(self.far, time.monotonic())
        self._beats: dict[int, bytes] = {}
        self._next = dict.fromkeys(self.far, 0)
        self._waiting: queue.Queue[str] = queue.Queue(MOST_WAITING)
        self._sent = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def silent(self, rank: int) -> bool:
        """Whether nothing was heard of a rank for SILENT_S."""
        return time.monotonic() - self._heard[rank] > SILENT_S

    def send(self, event: dict[str, Any]) -> None:
        """To rank 0, before long."""
        try:
            self._waiting.put_nowait(json.dumps(event))
        except queue.Full:
            return

    def end(self) -> None:
        """Sends what waits, and ends."""
        self._over.set()
        self._thread.join(timeout=2 * BEAT_S)

    def _beat(self) -> None:
        over, number = False, 0
        try:
            while not over:
                over = self._over.wait(BEAT_S)
                number += 1
                self.store.set(f"beat {self.rank}", str(number))
                self._listen()
                self._send()
                if self.emit:
                    self._receive(self.emit)
        except RuntimeError:  # the store is gone: from now on all are silent
            return

    def _listen(self) -> None:
        for rank in self.far:
            if self.store.check([f"beat {rank}"]):
                beat = bytes(self.store.get(f"beat {rank}"))
                if beat != self._beats.get(rank):
                    self._beats[rank], self._heard[rank] = beat, time.monotonic()

    def _send(self) -> None:
        while not self._waiting.empty():
            self.store.set(f"event {self.rank} {self._sent}", self._waiting.get())
            self._sent += 1

    def _receive(self, emit: Emit) -> None:
        for rank in self.far:
            while self.store.check([key := f"event {rank} {self._next[rank]}"]):
                event = json.loads(self.store.get(key))
                self.store.delete_key(key)
                self._next[rank] += 1
                emit(event.pop("kind"), **{**event, "rank": rank})
