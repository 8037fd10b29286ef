"""Verification on the host while the transfer goes on."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from typing import Any

from remote.ssh.errors import Unreachable, not_understood
from remote.ssh.process import Reserve
from remote.upload.hashes import Item
from surgvqa.errors import SurgvqaError


class Verifier:
    """Makes the host hash the large files as they arrive, while the rest is still being sent."""

    def __init__(self, reserve: Reserve, item: Item):
        self.reserve, self.item = reserve, item
        self.hashes: dict[int, str] = {}
        self.error: SurgvqaError | None = None
        self.changed = threading.Condition()
        self._large = set(item.large)
        self._refused: SurgvqaError | None = None
        self._start()

    def _start(self) -> None:
        self.error, self.ended = None, False
        if not self.item.large:
            return
        self._agent = self.reserve.take()
        self._agent.begin({"op": "verify", "digest": self.item.digest}, self._heard, self._ended)

    def tell(self, index: int, upto: int) -> None:
        """Tells the host that the first `upto` bytes of the file have arrived."""
        with contextlib.suppress(OSError):  # a broken verifier is started again in `wait`
            self._agent.write(json.dumps([index, upto]).encode() + b"\n")

    def wait(self, patience_s: float) -> dict[int, str]:
        """{file index: sha256 on the host} of every large file. Starts again after a lost connection."""
        deadline, heard = time.monotonic() + patience_s, len(self.hashes)
        while len(self.hashes) < len(self.item.large):
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
            for index in self.item.large:
                if index not in self.hashes:
                    self.tell(index, self.item.entries[index].size)
        return self.hashes

    def close(self) -> None:
        if self.item.large:
            self._agent.kill()
            self._agent.finish()

    def reset(self, index: int) -> None:
        """Makes the host delete the staged file, so that it can be sent again."""
        self.hashes.pop(index, None)
        self.tell(index, -1)

    def _heard(self, message: dict[str, Any]) -> None:
        with self.changed:
            index, sha256 = message.get("file"), message.get("sha256")
            if isinstance(index, int) and isinstance(sha256, str) and index in self._large:
                self.hashes[index] = sha256
            elif "sha256" in message:
                self._refused = not_understood(self.reserve.host, f"the hash of file {str(index)[:20]}")
                self._agent.kill()
            self.changed.notify_all()

    def _ended(self, error: SurgvqaError | None) -> None:
        with self.changed:
            self.error, self.ended = self._refused or error, True
            self.changed.notify_all()
