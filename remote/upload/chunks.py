"""Divides files into chunks and packs, and queues these for the streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from remote.agent.protocol import MAX_PACK_FILES, SMALL
from remote.upload.hashes import Item

PACK_BYTES = 1 << 20
"""Bytes of a pack at most: less than a chunk, since the host holds it in memory."""


@dataclass(eq=False)
class Chunk:
    """A piece of one file, or a pack of whole small files. `index` is the file, or the first file of the pack."""

    index: int
    offset: int
    length: int
    files: tuple[int, ...] = ()
    """The files in a pack."""
    hole: bool = False
    """Whether it was last sent without bytes, as a hole of a sparse file."""


def chunks_of(item: Item, whole: Collection[int], done: dict[int, list[list[int]]], largest: int) -> list[Chunk]:
    """The missing bytes of an item: small files in packs, and chunks for the gaps in what is `done` of larger files."""
    packs, found = [], []
    pack: list[int] = []
    length = 0
    for index, entry in enumerate(item.entries):
        if index in whole:
            continue
        if entry.size <= SMALL:
            if pack and (length + entry.size > PACK_BYTES or len(pack) == MAX_PACK_FILES):
                packs.append(Chunk(pack[0], 0, length, tuple(pack)))
                pack, length = [], 0
            pack.append(index)
            length += entry.size
            continue
        at = 0
        for offset, count in [*sorted(done.get(index, [])), [entry.size, 0]]:
            while at < offset:
                length_now = min(largest, offset - at)
                found.append(Chunk(index, at, length_now))
                at += length_now
            at = max(at, offset + count)
    if pack:
        packs.append(Chunk(pack[0], 0, length, tuple(pack)))
    return packs + found


class Queue:
    """The chunks still to be sent, by file: two streams writing into one file would wait for each other on the host."""

    def __init__(self, chunks: list[Chunk]):
        self.files: dict[int, deque[Chunk]] = {}
        self.chunks = self.bytes = 0
        self.put_back(chunks)

    def take(self, file: int, others: set[int]) -> Chunk:
        """The next chunk: of `file` if it has one, else of a file that no other stream sends, else of any."""
        if file not in self.files:
            file = next((f for f in self.files if f not in others), next(iter(self.files)))
        chunk = self.files[file].popleft()
        if not self.files[file]:
            del self.files[file]
        self.chunks -= 1
        self.bytes -= chunk.length
        return chunk

    def put_back(self, chunks: list[Chunk]) -> None:
        """Puts chunks back, to be sent next in their files."""
        for chunk in reversed(chunks):
            self.files.setdefault(chunk.index, deque()).appendleft(chunk)
            self.chunks += 1
            self.bytes += chunk.length
