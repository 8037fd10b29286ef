"""Files in chunks, and the queue that streams take them from."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from remote.upload.hashes import Item


@dataclass(eq=False)
class Chunk:
    """A piece of one file."""

    index: int
    offset: int
    length: int


def chunks_of(item: Item, done: dict[int, list[list[int]]], largest: int) -> list[Chunk]:
    """What is still to be sent: every file's gaps, in chunks."""
    found = []
    for index, entry in enumerate(item.entries):
        at = 0
        for offset, length in [*sorted(done.get(index, [])), [entry.size, 0]]:
            while at < offset:
                length_now = min(largest, offset - at)
                found.append(Chunk(index, at, length_now))
                at += length_now
            at = max(at, offset + length)
    return found


class Queue:
    """What is still to be sent, by file: two streams that wrote into one file would wait for each other on the host."""

    def __init__(self, chunks: list[Chunk]):
        self.files: dict[int, deque[Chunk]] = {}
        self.chunks = self.bytes = 0
        self.put_back(chunks)

    def take(self, file: int, others: set[int]) -> Chunk:
        """The next chunk of `file`, or else of a file that no other stream is at, or else of any."""
        if file not in self.files:
            file = next((f for f in self.files if f not in others), next(iter(self.files)))
        chunk = self.files[file].popleft()
        if not self.files[file]:
            del self.files[file]
        self.chunks -= 1
        self.bytes -= chunk.length
        return chunk

    def put_back(self, chunks: list[Chunk]) -> None:
        """These come first in their files."""
        for chunk in reversed(chunks):
            self.files.setdefault(chunk.index, deque()).appendleft(chunk)
            self.chunks += 1
            self.bytes += chunk.length
