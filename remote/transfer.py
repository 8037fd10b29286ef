"""Bulk bytes to a host: chunks over as many OpenSSH connections as the link rewards.

Each stream is an `ssh` subprocess (own TCP connection, the user's own configuration, AES-GCM where both ends have AES
hardware) that feeds the agent's `receive`. All streams draw from one queue, so a slow one holds nothing up, and a chunk
counts only when the host has acknowledged it. A stream that breaks gives its unacknowledged chunks back.

Why not rsync: it hashes and copies more than needed (measured 319 MB/s against 474 for plain bytes through ssh), cannot
spread one file over streams, and its resume modes either re-send everything or can end well with a wrong file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import struct
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from remote.bundle import bootstrap, payload
from remote.connection import Replies, Unreachable, explain_ssh, ssh_command
from remote.hosts import Host
from remote.plan import Item
from surgvqa.errors import SurgvqaError

FRAME = struct.Struct(">IQI")  # file index, offset, length: the agent's files.FRAME
CHUNK = 2 << 20
"""Bytes that a broken stream may have to send again, and the unit that streams share a file by."""
UNACKNOWLEDGED = 6 << 20  # bytes on the way in one stream; OpenSSH's own window is 2 MiB
BLOCK = 1 << 20
PIPE = 1 << 20  # the largest pipe that an ordinary user may have
MAX_STREAMS = 16
GAIN = 1.15  # more streams are kept when they bring at least this
PROBE_AGAIN_S = 30.0
FAST_CIPHER = "aes128-gcm@openssh.com"


def best_ciphers(host: Host, host_has_aes: bool) -> str | None:
    """AES-GCM first where both ends compute it in hardware and the user's ssh allows it; None leaves ssh's order."""
    allowed = host.setting("ciphers").split(",")
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            ours = " aes" in file.read()
    except OSError:
        ours = os.uname().machine == "arm64"
    if not (ours and host_has_aes and FAST_CIPHER in allowed):
        return None
    return ",".join([FAST_CIPHER, *(c for c in allowed if c != FAST_CIPHER)])


class AgentProcess:
    """The agent at the end of an `ssh` subprocess; its messages go to `on_message` on a thread of their own.

    `on_end(error)` comes once: None after a good end.
    """

    def __init__(
        self,
        host: Host,
        request: dict[str, Any],
        ciphers: str | None,
        on_message: Callable[[dict[str, Any]], None],
        on_end: Callable[[SurgvqaError | None], None],
    ):
        self.host = host
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            ssh_command(host, bootstrap(host.entry.python), ciphers),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            start_new_session=True,
        )
        with contextlib.suppress(OSError, AttributeError):
            fcntl.fcntl(self.process.stdin, fcntl.F_SETPIPE_SZ, PIPE)
        self._on_message, self._on_end = on_message, on_end
        self._lock = threading.Lock()
        with contextlib.suppress(OSError):
            self.write(payload({"workspace": host.entry.workspace, **request}))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def write(self, data: bytes | memoryview) -> None:
        """All of it; OSError when the other end is gone."""
        view = memoryview(data)
        with self._lock:
            while view:
                view = view[os.write(self.process.stdin.fileno(), view) :]

    def copy(self, source: int, offset: int, count: int) -> int:
        """Up to `count` bytes of an open file, without copying them through this process where the kernel can."""
        with self._lock:
            if hasattr(os, "splice"):
                return os.splice(source, self.process.stdin.fileno(), count, offset_src=offset)
            return os.write(self.process.stdin.fileno(), os.pread(source, count, offset))

    def finish(self) -> None:
        """No more input: the agent will end."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def kill(self) -> None:
        """Ends ssh and its proxy at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def join(self) -> None:
        self._reader.join()

    def _chunks(self):
        while True:
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                status = self.process.wait()
                self._stderr.seek(0)
                yield b"", self._stderr.read(), status
                return
            yield data, b"", None

    def _read(self) -> None:
        error: SurgvqaError | None = None
        text = b""

        def chunks():
            nonlocal text
            for data, stderr, status in self._chunks():
                text = stderr
                yield data, stderr, status

        try:
            for message in Replies(self.host, chunks()):
                self._on_message(message)
        except Unreachable:
            error = explain_ssh(self.host, text.decode(errors="replace"), self.process.wait())
        except SurgvqaError as failure:
            status = self.process.wait()
            broken = status == 255 or status < 0
            error = explain_ssh(self.host, text.decode(errors="replace"), status) if broken else failure
        except (OSError, ValueError) as failure:
            error = Unreachable(f"{self.host.name}: the stream broke: {failure}")
        finally:
            self.process.wait()
            self.process.stdout.close()
            self._stderr.close()
        self._on_end(error)


@dataclass(eq=False)
class Chunk:
    """A piece of one file."""

    index: int
    offset: int
    length: int


def chunks_of(item: Item, done: dict[int, list[list[int]]]) -> list[Chunk]:
    """What is still to be sent: every file's gaps, in chunks."""
    found = []
    for index, entry in enumerate(item.entries):
        at = 0
        for offset, length in [*sorted(done.get(index, [])), [entry.size, 0]]:
            while at < offset:
                length_now = min(CHUNK, offset - at)
                found.append(Chunk(index, at, length_now))
                at += length_now
            at = max(at, offset + length)
    return found


@dataclass(eq=False)
class Stream:
    """One connection: a thread writes chunks, the agent's acknowledgements come back."""

    transfer: Transfer
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
            self.agent = AgentProcess(
                transfer.host,
                {"op": "receive", "digest": transfer.item.digest},
                transfer.ciphers,
                self._heard,
                self._ended,
            )
        except OSError as error:
            transfer.fail(SurgvqaError(f"ssh: {error.strerror}"))
            self.live = False
            return
        opened, source = -1, -1
        try:
            while (chunk := transfer.take(self)) is not None:
                if chunk.index != opened:
                    if source >= 0:
                        os.close(source)
                    source = os.open(transfer.item.entries[chunk.index].source, os.O_RDONLY)
                    opened = chunk.index
                self._write(source, chunk)
        except OSError as error:
            if error.filename:  # the source, not the pipe
                transfer.fail(SurgvqaError(f"{error.filename}: {error.strerror}"))
        finally:
            if source >= 0:
                os.close(source)
            self.agent.finish()

    def _write(self, source: int, chunk: Chunk) -> None:
        self.agent.write(FRAME.pack(chunk.index, chunk.offset, chunk.length))
        at, end = chunk.offset, chunk.offset + chunk.length
        while at < end:
            count = self.agent.copy(source, at, min(BLOCK, end - at))
            if not count:  # the file became shorter
                self.transfer.fail(changed(self.transfer.item.entries[chunk.index].source))
                self.agent.kill()
                return
            at += count

    def _heard(self, message: dict[str, Any]) -> None:
        with self.transfer.changed:
            self.speaking = True
            if "got" in message:
                self.transfer.received += message["got"] - self.got
                self.got = message["got"]
            if "ack" in message:
                chunk = self.waiting.pop(tuple(message["ack"]))
                self.transfer.acknowledge(chunk)
            self.transfer.changed.notify_all()

    def _ended(self, error: SurgvqaError | None) -> None:
        with self.transfer.changed:
            self.live = False
            self.transfer.give_back(self, error)
            self.transfer.changed.notify_all()


def changed(source: object) -> SurgvqaError:
    return SurgvqaError(f"{source}: changed while it was sent; nothing was published, run the upload again")


class Transfer:
    """Sends the missing chunks of one item. `run` returns when the host has acknowledged all of them."""

    def __init__(
        self,
        host: Host,
        item: Item,
        done: dict[int, list[list[int]]],
        *,
        ciphers: str | None,
        rtt_s: float,
        cores: int = 2,
        streams: int = 0,
        patience_s: float = 300.0,
        on_progress: Callable[[Transfer], None] | None = None,
        on_file: Callable[[int, int], None] | None = None,
    ):
        self.host, self.item, self.ciphers, self.rtt_s = host, item, ciphers, rtt_s
        self.fixed, self.patience_s = streams, patience_s
        self.on_progress, self.on_file = on_progress, on_file
        self.changed = threading.Condition(threading.RLock())
        self.queue = deque(chunks_of(item, done))
        self.left = len(self.queue)
        self.total = sum(c.length for c in self.queue)
        self.acknowledged = 0
        self.received = 0
        """Bytes that reached the host, also of chunks that broke."""
        self.resent = 0
        self.fatal: SurgvqaError | None = None
        self.last_error: SurgvqaError | None = None
        self.streams: list[Stream] = []
        # On a short link only the cipher counts, and a stream keeps a core busy at each end; on a long one, windows and
        # lost packets bound each stream, so it starts with more.
        self.most = max(2, cores) if rtt_s < 0.005 else MAX_STREAMS
        self.wanted = streams or (2 if rtt_s < 0.04 else 8)
        self.history: list[tuple[int, float]] = []
        """(streams, bytes/s) as measured."""
        self._prefix = [0] * len(item.entries)
        self._arrived: list[dict[int, int]] = [dict(map(tuple, done.get(i, []))) for i in range(len(item.entries))]
        for index, entry in enumerate(item.entries):
            if self._advance(index) or not entry.size:
                self._tell(index)

    # --- called by the streams ---------------------------------------------------------------------------------------

    def take(self, stream: Stream) -> Chunk | None:
        """The next chunk for `stream`; waits while too much of it is on its way; None: no more for this stream."""
        with self.changed:
            while True:
                if not stream.live or stream.retiring or self.fatal or not self.left:
                    return None
                on_the_way = sum(c.length for c in stream.waiting.values())
                if self.queue and on_the_way < UNACKNOWLEDGED:
                    chunk = self.queue.popleft()
                    stream.waiting[chunk.index, chunk.offset] = chunk
                    return chunk
                self.changed.wait(1.0)

    def acknowledge(self, chunk: Chunk) -> None:
        self.left -= 1
        self.acknowledged += chunk.length
        self._arrived[chunk.index][chunk.offset] = chunk.length
        if self._advance(chunk.index):
            self._tell(chunk.index)

    def give_back(self, stream: Stream, error: SurgvqaError | None) -> None:
        """The chunks of a stream that ended go to the front of the queue."""
        self.resent += sum(c.length for c in stream.waiting.values())
        self.queue.extendleft(reversed(stream.waiting.values()))
        stream.waiting.clear()
        if error is not None:
            self.last_error = error
            if not isinstance(error, Unreachable):
                self.fail(error)

    def fail(self, error: SurgvqaError) -> None:
        """Ends the transfer for good; the first reason counts."""
        with self.changed:
            self.fatal = self.fatal or error
            self.changed.notify_all()

    def _advance(self, index: int) -> bool:
        """Moves the contiguous beginning of a file on; whether it moved."""
        before, arrived = self._prefix[index], self._arrived[index]
        while self._prefix[index] in arrived and arrived[self._prefix[index]]:
            self._prefix[index] += arrived[self._prefix[index]]
        return self._prefix[index] > before

    def _tell(self, index: int) -> None:
        if self.on_file:
            self.on_file(index, self._prefix[index])

    # --- the controller ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until everything is there. Raises the error that ends it for good."""
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
                    missing = min(self.wanted, max(1, len(self.queue) + len(live))) - len(live)
                    surplus = live[self.wanted :]
                if now - heard > self.patience_s:
                    reason = self.last_error or Unreachable(f"{self.host.name}: no answer")
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
                with self.changed:
                    if self.left:
                        self.changed.wait(0.1)
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
    """Finds how many streams the link rewards: doubles them while that brings GAIN, goes back when it does not."""

    def __init__(self, transfer: Transfer):
        self.transfer = transfer
        self.settle_s = 0.3 + 10 * transfer.rtt_s  # TCP's slow start
        self.window_s = 0.7 + 30 * transfer.rtt_s
        self.base: tuple[int, float] | None = None
        self.phase_since: float | None = None
        self.window: tuple[float, int] | None = None
        self.rest_until = 0.0

    def look(self, now: float) -> None:
        """Called often; changes transfer.wanted."""
        transfer = self.transfer
        live = [s for s in transfer.streams if s.live and s.speaking and not s.retiring]
        if now < self.rest_until or len(live) < transfer.wanted or len(transfer.queue) < 2 * transfer.wanted:
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
        if now - began < self.window_s:
            return
        rate = (transfer.received - before) / (now - began)
        transfer.history.append((transfer.wanted, rate))
        self.phase_since = self.window = None
        if self.base and rate < GAIN * self.base[1]:
            transfer.wanted = self.base[0]
            self.base, self.rest_until = None, now + PROBE_AGAIN_S
        elif transfer.wanted * 2 <= transfer.most and self._worth_it(rate):
            self.base = transfer.wanted, rate
            transfer.wanted *= 2
        else:
            self.base, self.rest_until = None, now + PROBE_AGAIN_S

    def _worth_it(self, rate: float) -> bool:
        """Whether enough is left to measure more streams, and to gain by them."""
        left = sum(chunk.length for chunk in self.transfer.queue)
        return left > 3 * rate * (self.settle_s + self.window_s)


class Verifier:
    """Has the host hash what arrives, while the rest is still on its way."""

    def __init__(self, host: Host, item: Item):
        self.host, self.item = host, item
        self.hashes: dict[int, str] = {}
        self.error: SurgvqaError | None = None
        self.changed = threading.Condition()
        self._upto: dict[int, int] = {}
        self._agent: AgentProcess | None = None
        self._start()

    def _start(self) -> None:
        self.error, self.ended = None, False
        self._agent = AgentProcess(
            self.host, {"op": "verify", "digest": self.item.digest}, None, self._heard, self._ended
        )

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
                raise error or SurgvqaError(f"{self.host.name}: the host ended before every file was verified")
            time.sleep(1.0)
            self._start()
            for index, entry in enumerate(self.item.entries):
                if index not in self.hashes:
                    self.tell(index, entry.size)
        return self.hashes

    def close(self) -> None:
        if self._agent:
            self._agent.finish()
            self._agent.kill()

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
