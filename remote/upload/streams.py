"""Sends chunks to a host over several OpenSSH connections, as many as make the transfer faster.

Each stream is an `ssh` subprocess (own TCP connection, the user's own configuration, AES-GCM where both ends have AES
hardware) that feeds the agent's `receive`. All streams take chunks from one queue, so a slow stream delays no other. A
chunk counts only when the host has acknowledged it. A stream that breaks returns its unacknowledged chunks.

Why not rsync: it hashes and copies more than needed (measured 319 MB/s against 474 for plain bytes through ssh), cannot
spread one file over streams, and its resume modes either re-send everything or can end well with a wrong file.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from remote.agent.protocol import FRAME, HOLE, INDEX, PACK
from remote.ssh.errors import Unreachable, not_understood
from remote.ssh.patience import PATIENCE_S
from remote.ssh.process import Reserve
from remote.upload.chunks import Chunk, Queue, chunks_of
from remote.upload.hashes import Item, read_small
from surgvqa.errors import SurgvqaError

CHUNK = 2 << 20
"""The unit that streams share a file by, and that a broken stream sends again."""
SHORT_LINK_S = 0.005  # only the processors count on a link shorter than this
SHORT_LINK_CHUNK = 8 << 20  # fewer acknowledgements
UNACKNOWLEDGED = 3  # chunks on the way in one stream; OpenSSH's own window is 2 MiB
MAX_STREAMS = 16
GAIN = 1.15  # more streams are kept when they bring at least this
PROBE_AGAIN_S = 30.0
FULL = 0.2  # of a round trip: so long a queue means that the link has all it can carry


@dataclass(eq=False)
class Stream:
    """One connection: a thread writes chunks, the agent's acknowledgements come back."""

    transfer: Transfer
    file: int = -1
    waiting: dict[tuple[int, int], Chunk] = field(default_factory=dict)
    got: int = 0
    """Bytes that the host has of this stream."""
    live: bool = True
    retiring: bool = False
    speaking: bool = False

    def start(self) -> None:
        threading.Thread(target=self._send, daemon=True).start()

    def _send(self) -> None:
        transfer = self.transfer
        try:
            self.agent = transfer.reserve.take()
        except OSError as error:
            transfer.fail(SurgvqaError(f"ssh: {error.strerror}"))
            self.live = False
            return
        self.agent.begin({"op": "receive", "digest": transfer.item.digest}, self._heard, self._ended)
        opened = -1
        file: BinaryIO | None = None
        try:
            while (chunk := transfer.take(self)) is not None:
                if chunk.files:
                    self.agent.write(self._pack(chunk))
                    continue
                source = transfer.item.entries[chunk.index].source
                if chunk.index != opened:
                    if file:
                        file.close()
                    file, opened = open(source, "rb", buffering=0), chunk.index  # noqa: SIM115
                assert file
                chunk.hole = is_hole(file.fileno(), chunk.offset, chunk.length)
                if chunk.hole:
                    self.agent.write(FRAME.pack(chunk.index | HOLE, chunk.offset, chunk.length))
                    continue
                self.agent.write(FRAME.pack(chunk.index, chunk.offset, chunk.length))
                if self.agent.copy(file, chunk.offset, chunk.length) < chunk.length:
                    raise changed(source)
        except SurgvqaError as error:
            transfer.fail(error)
            self.agent.kill()
        except OSError as error:
            if error.filename:  # the source, not the connection
                transfer.fail(SurgvqaError(f"{error.filename}: {error.strerror}"))
        finally:
            if file:
                file.close()
            self.agent.finish()

    def _pack(self, chunk: Chunk) -> bytes:
        """The bytes of a pack. Raises SurgvqaError for a file whose size has changed."""
        parts = [FRAME.pack(PACK, len(chunk.files), chunk.length)]
        parts += [INDEX.pack(index) for index in chunk.files]
        for index in chunk.files:
            entry = self.transfer.item.entries[index]
            content = self.transfer.contents.pop(entry.source, None)
            if content is None:
                content = read_small(entry.source, entry.size)
            if len(content) != entry.size:
                raise changed(entry.source)
            parts.append(content)
        return b"".join(parts)

    def _heard(self, message: dict[str, Any]) -> None:
        with self.transfer.changed:
            self.speaking = True
            try:
                self._count(message)
            except SurgvqaError as error:
                self.transfer.fail(error)
                self.agent.kill()
            self.transfer.changed.notify_all()

    def _count(self, message: dict[str, Any]) -> None:
        """Counts an acknowledgement. Raises SurgvqaError for one of a chunk that was not sent."""
        got, ack, wrong = message.get("got", self.got), message.get("ack"), message.get("wrong", [])
        if not (isinstance(got, int) and self.got <= got <= self.got + self.transfer.total):
            raise not_understood(self.transfer.reserve.host, f"{str(got)[:20]} bytes received")
        self.transfer.received += got - self.got
        self.got = got
        if ack is None:
            return
        key = (ack[0], ack[1]) if isinstance(ack, list) and [type(part) for part in ack] == [int, int] else (-1, -1)
        chunk = self.waiting.pop(key, None)
        if chunk is None or not isinstance(wrong, list) or not all(index in chunk.files for index in wrong):
            raise not_understood(self.transfer.reserve.host, f"{str(ack)[:40]} acknowledged")
        self.transfer.wrong.update(wrong)
        self.transfer.total -= chunk.length if chunk.hole else 0
        self.transfer.acknowledge(chunk)

    def _ended(self, error: SurgvqaError | None) -> None:
        with self.transfer.changed:
            self.live = False
            self.transfer.give_back(self, error)
            self.transfer.changed.notify_all()


def is_hole(file: int, offset: int, length: int) -> bool:
    """Whether an open file has no data there (lseek(2), SEEK_DATA); False where the system cannot tell."""
    try:
        return os.lseek(file, offset, os.SEEK_DATA) >= offset + length
    except OSError as error:
        return error.errno == errno.ENXIO  # none up to the end
    except AttributeError:
        return False


def changed(source: object) -> SurgvqaError:
    return SurgvqaError(f"{source}: changed while it was sent; nothing was published, run the upload again")


class Transfer:
    """Sends the missing chunks of one item. `run` returns once the host has acknowledged all of them."""

    def __init__(
        self,
        reserve: Reserve,
        item: Item,
        done: dict[int, list[list[int]]],
        *,
        rtt_s: float,
        whole: Collection[int] = (),
        contents: dict[str, bytes] | None = None,
        cores: int = 2,
        streams: int = 0,
        patience_s: float = PATIENCE_S,
        queueing: Callable[[], float | None] = lambda: None,
        on_progress: Callable[[Transfer], None] | None = None,
        on_file: Callable[[int, int], None] | None = None,
    ):
        self.reserve, self.item, self.rtt_s = reserve, item, rtt_s
        self.contents = {} if contents is None else contents
        """Files that need not be read, by their paths here; each is given up when it is sent."""
        self.fixed, self.patience_s, self.queueing = streams, patience_s, queueing
        self.on_progress, self.on_file = on_progress, on_file
        self.changed = threading.Condition(threading.RLock())
        short = rtt_s < SHORT_LINK_S
        self.chunk = SHORT_LINK_CHUNK if short else CHUNK
        self.queue = Queue(chunks_of(item, whole, done, self.chunk))
        self.left, self.total = self.queue.chunks, self.queue.bytes
        self.received = 0
        """Bytes that reached the host, including those of chunks that were cut."""
        self.resent = 0
        self.wrong: set[int] = set()
        """Small files that arrived with a wrong hash."""
        self.fatal: SurgvqaError | None = None
        self.over = threading.Event()
        self.last_error: SurgvqaError | None = None
        self.streams: list[Stream] = []
        # On a short link only the cipher counts, and a stream keeps a core busy at each end; on a long one, windows and
        # lost packets bound each stream, so it starts with more.
        self.most = max(2, cores) if short else MAX_STREAMS
        self.wanted = streams or (2 if rtt_s < 0.04 else 8)
        self.history: list[tuple[int, float]] = []
        """(streams, bytes/s) as measured."""
        self._prefix = dict.fromkeys(item.large, 0)
        """{large file: number of bytes from its beginning that are on the host}."""
        self._arrived: dict[int, dict[int, int]] = {
            index: {0: item.entries[index].size}
            if index in whole
            else {offset: length for offset, length in done.get(index, [])}
            for index in item.large
        }
        for index in item.large:
            if self._advance(index):
                self._tell(index)

    # --- called by the streams ---------------------------------------------------------------------------------------

    def take(self, stream: Stream) -> Chunk | None:
        """The next chunk for `stream`, None at the end. Waits while the stream has too many unacknowledged bytes."""
        with self.changed:
            while True:
                if not stream.live or stream.retiring or self.fatal or not self.left:
                    return None
                on_the_way = sum(c.length for c in stream.waiting.values())
                if self.queue.chunks and on_the_way < UNACKNOWLEDGED * self.chunk:
                    chunk = self.queue.take(stream.file, {s.file for s in self.streams if s is not stream})
                    stream.file = chunk.index
                    stream.waiting[chunk.index, chunk.offset] = chunk
                    return chunk
                self.changed.wait(1.0)

    def acknowledge(self, chunk: Chunk) -> None:
        self.left -= 1
        if not self.left:
            self.over.set()
        if not chunk.files:
            self._arrived[chunk.index][chunk.offset] = chunk.length
            if self._advance(chunk.index):
                self._tell(chunk.index)

    def give_back(self, stream: Stream, error: SurgvqaError | None) -> None:
        """Returns the chunks of a stream that ended to the front of the queue."""
        self.resent += sum(c.length for c in stream.waiting.values())
        self.queue.put_back(list(stream.waiting.values()))
        stream.waiting.clear()
        if error is not None:
            self.last_error = error
            if not isinstance(error, Unreachable):
                self.fail(error)

    def fail(self, error: SurgvqaError) -> None:
        """Ends the transfer. Only the first error counts."""
        with self.changed:
            self.fatal = self.fatal or error
            self.over.set()
            self.changed.notify_all()

    def _advance(self, index: int) -> bool:
        """Updates the contiguous beginning of a file. Returns whether it has grown."""
        before, arrived = self._prefix[index], self._arrived[index]
        while self._prefix[index] in arrived and arrived[self._prefix[index]]:
            self._prefix[index] += arrived[self._prefix[index]]
        return self._prefix[index] > before

    def _tell(self, index: int) -> None:
        if self.on_file:
            self.on_file(index, self._prefix[index])

    def _stalled(self) -> Unreachable:
        """Why nothing is acknowledged, if no stream has ended with an error."""
        name = self.reserve.host.name
        if any(stream.speaking for stream in self.streams):
            return Unreachable(f"{name}: the agent there runs but acknowledges nothing; is its disk well?")
        return Unreachable(f"{name}: ssh runs, but the login shell there has not started the agent")

    # --- the controller ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Returns when everything is on the host. Raises the error that ended the transfer."""
        tuner = Tuner(self)
        heard, received, backoff, not_before = time.monotonic(), 0, 1.0, 0.0
        try:
            while self.left:
                now = time.monotonic()
                with self.changed:
                    if self.fatal:
                        raise self.fatal
                    if self.received > received:
                        received, heard, backoff = self.received, now, 1.0
                    live = [s for s in self.streams if s.live and not s.retiring]
                    broken = any(not s.live and not s.retiring for s in self.streams)
                    self.streams = [s for s in self.streams if s.live]
                    if broken and now >= not_before:
                        not_before, backoff = now + backoff, min(backoff * 2, 15.0)
                    missing = min(self.wanted, max(1, self.queue.chunks + len(live))) - len(live)
                    surplus = live[self.wanted :]
                if now - heard > self.patience_s:
                    reason = self.last_error or self._stalled()
                    raise Unreachable(
                        f"{reason}; gave up after {self.patience_s:.0f} s, run the same upload again to go on from here"
                    )
                if now >= not_before:
                    for _ in range(missing):
                        stream = Stream(self)
                        self.streams.append(stream)
                        stream.start()
                for stream in surplus:
                    stream.retiring = True
                if not self.fixed:
                    tuner.look(now)
                if self.on_progress:
                    self.on_progress(self)
                self.over.wait(0.1)
            if self.on_progress:
                self.on_progress(self)
        finally:
            if self.left:
                with self.changed:
                    self.changed.notify_all()
                for stream in self.streams:
                    agent = getattr(stream, "agent", None)
                    if agent:
                        agent.kill()


class Tuner:
    """Finds the best number of streams: doubles it while that makes the transfer GAIN times as fast.

    On a long link that is already full it changes nothing: more streams would only overflow the queue of the link, and
    TCP cubic needs many seconds to recover from the losses.
    """

    def __init__(self, transfer: Transfer):
        self.transfer = transfer
        self.settle_s = 0.3 + 10 * transfer.rtt_s  # TCP's slow start
        self.window_s = 0.7 + 30 * transfer.rtt_s
        self.base: tuple[int, float] | None = None
        self.phase_since: float | None = None
        self.window: tuple[float, int] | None = None
        self.rest_until = 0.0
        self.idle_queueing = transfer.queueing() or 0.0
        """The queue before we send anything. On wireless links it varies by itself."""

    def look(self, now: float) -> None:
        """Called often; changes transfer.wanted."""
        transfer = self.transfer
        live = [s for s in transfer.streams if s.live and s.speaking and not s.retiring]
        if now < self.rest_until or len(live) < transfer.wanted or transfer.queue.chunks < 2 * transfer.wanted:
            self.phase_since = self.window = None
            return
        if self.phase_since is None:
            self.phase_since = now
        if now - self.phase_since < self.settle_s:
            return
        if self.window is None:
            self.window = now, transfer.received
            return
        began, before = self.window
        queueing = self.transfer.queueing()
        if now - began < self.window_s:
            return
        rate = (transfer.received - before) / (now - began)
        transfer.history.append((transfer.wanted, rate))
        self.phase_since = self.window = None
        if self.base and rate < GAIN * self.base[1]:
            transfer.wanted = self.base[0]
            self.base, self.rest_until = None, now + PROBE_AGAIN_S
        elif transfer.wanted * 2 <= transfer.most and self._worth_it(rate) and not self._full(queueing):
            self.base = transfer.wanted, rate
            transfer.wanted *= 2
        else:
            self.base, self.rest_until = None, now + PROBE_AGAIN_S

    def _full(self, queueing: float | None) -> bool:
        """Whether packets queue at the narrowest link. On a short link the delay comes from the processors."""
        rtt_s = self.transfer.rtt_s
        return queueing is not None and rtt_s >= SHORT_LINK_S and queueing - self.idle_queueing > FULL * rtt_s

    def _worth_it(self, rate: float) -> bool:
        """Whether enough bytes are left to measure more streams and to gain from them."""
        return self.transfer.queue.bytes > 3 * rate * (self.settle_s + self.window_s)
