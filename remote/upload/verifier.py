"""Verification on the host while the transfer goes on."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from typing import Any

from remote.ssh.errors import Unreachable
from remote.ssh.process import Reserve
from remote.upload.hashes import Item
from surgvqa.errors import SurgvqaError


class Verifier:
    """Has the host hash what arrives, while the rest is still on its way."""

    def __init__(self, reserve: Reserve, item: Item):
        self.reserve, self.item = reserve, item
        self.hashes: dict[int, str] = {}
        self.error: SurgvqaError | None = None
        self.changed = threading.Condition()
        self._upto: dict[int, int] = {}
        self._start()

    def _start(self) -> None:
        self.error, self.ended = None, False
        self._agent = self.reserve.take()
        self._agent.begin({"op": "verify", "digest": self.item.digest}, self._heard, self._ended)

    def tell(self, index: int, upto: int) -> None:
        """The first `upto` bytes of the file are there."""
        self._upto[index] = upto
        with contextlib.suppress(OSError):  # a broken verifier is started again in `wait`
            self._agent.write(json.dumps([index, upto]).encode() + b"\n")

    def wait(self, patience_s: float) -> dict[int, str]:
        """File index -> sha256 on the host, for every file; starts again where the connection broke."""
        deadline, heard = time.monotonic() + patience_s, len(self.hashes)
        while len(self.hashes) < len(self.item.entries):
            with self.changed:
                self.changed.wait(0.2)
                ended, error = self.ended, self.error
            if len(self.hashes) > heard:
                heard, deadline = len(self.hashes), time.monotonic() + patience_s
            if not ended:
                continue
            if (error and not isinstance(error, Unreachable)) or time.monotonic() > deadline:
                raise error or SurgvqaError(f"{self.reserve.host.name}: the host ended before every file was verified")
            time.sleep(1.0)
            self._start()
            for index, entry in enumerate(self.item.entries):
                if index not in self.hashes:
                    self.tell(index, entry.size)
        return self.hashes

    def close(self) -> None:
        self._agent.kill()
        self._agent.finish()

    def reset(self, index: int) -> None:
        """Has the staged file thrown away, to be sent again."""
        self.hashes.pop(index, None)
        self.tell(index, -1)

    def _heard(self, message: dict[str, Any]) -> None:
        with self.changed:
            if "sha256" in message:
                self.hashes[message["file"]] = message["sha256"]
            self.changed.notify_all()

    def _ended(self, error: SurgvqaError | None) -> None:
        with self.changed:
            self.error, self.ended = error, True
            self.changed.notify_all()
