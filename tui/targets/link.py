"""One SSH connection to one host for the whole panel, owned by one thread: neither Fabric nor paramiko is thread-safe.

Any thread may ask (`call`, `stream`); the link's thread alone opens the connection and its channels, reads them, and
connects anew after a loss, 1, 2, 4 … 30 s apart. To remote's own code a link is a `remote.ssh.connection.Remote`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remote.ssh.answers import checked
from remote.ssh.errors import Unreachable
from remote.ssh.host_keys import UnknownHostKey
from remote.ssh.hosts import Host, resolve
from remote.ssh.patience import pause_s
from surgvqa.errors import SurgvqaError
from surgvqa.runs.history import RunSummary
from tui.targets.connection_state import ConnectionState, Detached
from tui.targets.exchange import Exchange, Line

LIST_EVERY_S = 5.0  # 0.09 s of a host core each, measured
CLOCK_TOLERANCE_S = 5.0  # a host's clock that is further away is allowed for
LOOK_S = 1.0
log = logging.getLogger(__name__)

CHANNELS = 8  # at once; sshd's MaxSessions is 10 unless changed


class Link:
    """The connection to the host of that name: what it is like, the host's run list, and anything one may ask it."""

    def __init__(self, name: str, workspace: Path):
        self.name, self.workspace = name, workspace
        self.connection = ConnectionState("connecting")
        self.host: Host | None = None
        """Known once it has been looked up."""
        self.facts: dict[str, Any] = {}
        """The agent's `probe`: workspace, free bytes, versions."""
        self.listed: list[RunSummary] | None = None
        """The host's runs, newest first; None until they were heard."""
        self.ahead_s = 0.0
        """How far the host's clock is ahead of ours; its times are given in ours."""
        self._line: Line | None = None
        self._inbox: queue.SimpleQueue[Exchange] = queue.SimpleQueue()
        self._open: list[Exchange] = []
        self._waiting: list[Exchange] = []
        self._list_due = 0.0
        self._listing: Exchange | None = None
        self._again = self._accepted = self._ended = False
        self._alarm, self._bell = os.pipe()
        os.set_blocking(self._alarm, False)
        os.set_blocking(self._bell, False)
        threading.Thread(target=self._run, name=f"link to {name}", daemon=True).start()

    # --- from any thread ---------------------------------------------------------------------------------------------

    def request(self, op: str, params: dict[str, Any], patient: bool = False) -> Exchange:
        """Hands in a request. Raises Unreachable when there is no connection, unless it is `patient`."""
        if self._ended:
            raise Detached(f"{self.name}: the link was ended")
        if not patient and self.connection.kind not in ("connected", "connecting"):
            raise Unreachable(self.connection.text)
        exchange = Exchange(op, params, patient)
        self._inbox.put(exchange)
        self._ring()
        return exchange

    def leave(self, exchange: Exchange) -> None:
        """The answer is not wanted any more; the agent there ends."""
        exchange.left = True
        self._ring()

    def stream(self, op: str, patient: bool = False, **params: Any) -> Iterator[dict[str, Any]]:
        """The agent's messages as they come; raises what it answers as an error."""
        exchange = self.request(op, params, patient)
        try:
            for message in exchange:
                yield checked(self.host, op, params, message) if self.host else message
        finally:
            self.leave(exchange)

    def call(self, op: str, patient: bool = False, **params: Any) -> dict[str, Any]:
        """The agent's answer to one question."""
        answer: dict[str, Any] = {}
        for message in self.stream(op, patient, **params):
            answer = message
        return answer

    ask = call
    """A `Remote` keeps an agent for such questions; here each has a channel of its own, and none waits for another."""

    def probe(self) -> None:
        """Looks anew at what the host has."""
        assert self.host
        self.facts = self.call("probe", venv=self.host.entry.venv)

    def look(self) -> None:
        """Reads the run list now."""
        self._list_due = 0.0
        self._ring()

    def again(self) -> None:
        """Tries to connect now."""
        self._again = True
        self._ring()

    def accept(self) -> None:
        """The shown host key is the right one: it goes to known_hosts."""
        self._accepted = True
        self._ring()

    def refuse(self) -> None:
        """The shown host key is not taken."""
        self.connection = ConnectionState("refused", f"{self.name}: its host key was not accepted")

    def end(self) -> None:
        """Closes the connection; jobs on the host do not notice."""
        self._ended = True
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # a full pipe rings as well
            os.write(self._bell, b"!")

    # --- the link's own thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        attempt = 0
        while not self._ended:
            pause: float | None = None
            try:
                self._connect()
                attempt = 0
                self._serve()
                continue
            except UnknownHostKey as unknown:
                self.connection = ConnectionState("unknown key", str(unknown), key=unknown)
            except Exception as error:  # whatever it is, the panel goes on and says so
                known = isinstance(error, SurgvqaError)
                if not known:
                    log.exception("the connection to %s failed", self.name)
                text = str(error) if known else f"{self.name}: {type(error).__name__}: {error}"
                if known and not isinstance(error, Unreachable):
                    self.connection = ConnectionState("refused", text)
                else:  # all but an answer of the server (remote.ssh.patience)
                    since = self.connection.since if self.connection.kind == "unreachable" else time.time()
                    self.connection = ConnectionState("unreachable", text, since)
                    pause = pause_s(attempt)
                    attempt += 1
            self._drop()
            self._rest(pause)
        self._drop(Detached(f"{self.name}: the link was ended"))

    def _connect(self) -> None:
        if self.connection.kind != "unreachable":  # "since" stays to be read until the host is there again
            self.connection = ConnectionState("connecting")
        self.host = resolve(self.name, self.workspace)
        self._line = Line(self.host)
        self._line.open()
        self.facts = self._line.call("probe", venv=self.host.entry.venv)
        ahead = self.facts["time"] - time.time()
        self.ahead_s = ahead if abs(ahead) > CLOCK_TOLERANCE_S else 0.0
        self._list_due = 0.0
        self.connection = ConnectionState("connected")

    def _serve(self) -> None:
        """Until the link is ended; raises when the connection is lost."""
        assert self._line and self.host
        while not self._ended:
            self._begin_waiting()
            for exchange in list(self._open):
                if exchange.left or exchange.read(self.host):
                    exchange.close()
                    self._open.remove(exchange)
                    if exchange is self._listing:
                        self._take_list(exchange)
            if not self._line.alive:
                raise Unreachable(f"{self.name}: connection lost")
            speaking = [e.channel for e in self._open if not e.quiet]
            select.select([self._alarm, *speaking], [], [], LOOK_S if len(speaking) == len(self._open) else 0.02)
            self._silence()

    def _begin_waiting(self) -> None:
        assert self._line
        if time.monotonic() >= self._list_due and self._listing is None:
            self._listing = Exchange("runs", {}, patient=False)
            self._waiting.append(self._listing)
        self._collect()
        while self._waiting and len(self._open) < CHANNELS:
            exchange = self._waiting.pop(0)
            if exchange.left:
                continue
            self._open.append(exchange)
            try:
                exchange.begin(self._line)
            except SurgvqaError:
                raise
            except Exception as error:
                raise Unreachable(f"{self.name}: connection lost: {str(error) or type(error).__name__}") from None

    def _take_list(self, listing: Exchange) -> None:
        self._listing, self._list_due = None, time.monotonic() + LIST_EVERY_S
        with contextlib.suppress(SurgvqaError):  # the next one may be heard
            for answer in listing:
                assert self.host
                self.listed = [self._summary(row) for row in checked(self.host, "runs", {}, answer)["runs"]]

    def _summary(self, row: dict[str, Any]) -> RunSummary:
        known = {name: row[name] for name in RunSummary.__dataclass_fields__}
        return RunSummary(**{**known, "started": row["started"] - self.ahead_s, "folder": Path(row["folder"])})

    def _collect(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.append(self._inbox.get_nowait())

    def _drop(self, error: SurgvqaError | None = None) -> None:
        """Ends every exchange that cannot wait, and the connection."""
        self._collect()
        failure = error or Unreachable(self.connection.text)
        for exchange in [*self._open, *(e for e in self._waiting if error or not e.patient)]:
            exchange.end(failure)
            exchange.close()
        self._open, self._listing = [], None
        self._waiting = [e for e in self._waiting if e.patient and not error]
        if self._line is not None:
            self._line.close()
            self._line = None

    def _rest(self, seconds: float | None) -> None:
        """Until it is time to connect again, or somebody asks for it."""
        until = None if seconds is None else time.monotonic() + seconds
        while not self._ended and not self._again and (until is None or time.monotonic() < until):
            if self._accepted and self.connection.key:
                try:
                    self.connection.key.remember()
                except (OSError, SurgvqaError) as error:
                    self.connection = ConnectionState("refused", f"{self.name}: the key cannot be remembered: {error}")
                else:
                    break
            self._accepted = False
            select.select([self._alarm], [], [], None if until is None else max(0.0, until - time.monotonic()))
            self._silence()
            self._drop()
        self._again = self._accepted = False

    def _silence(self) -> None:
        with contextlib.suppress(OSError):
            os.read(self._alarm, 4096)


class Port:
    """A link as one follower sees it: patient over lost connections, and left at once when nobody reads any more."""

    def __init__(self, link: Link):
        self.link = link
        self._asked: set[Exchange] = set()
        self._closed = threading.Event()

    @property
    def host(self) -> Host:
        assert self.link.host
        return self.link.host

    def stream(self, op: str, **params: Any) -> Iterator[dict[str, Any]]:
        """As `Link.stream`; raises Detached after `detach`."""
        exchange = self.link.request(op, params, patient=True)
        self._asked.add(exchange)
        try:
            if self.closed:
                raise Detached("closed")
            yield from exchange
        finally:
            self._asked.discard(exchange)
            self.link.leave(exchange)

    def call(self, op: str, **params: Any) -> dict[str, Any]:
        """As `Link.call`, asked again until the host has answered."""
        while True:
            answer: dict[str, Any] = {}
            try:
                for message in self.stream(op, **params):
                    answer = message
                return answer
            except Unreachable:
                time.sleep(LOOK_S)

    @property
    def closed(self) -> bool:
        """Whether nobody reads any more."""
        return self._closed.is_set()

    def wait(self, seconds: float) -> None:
        """Waits that long, or until nobody reads any more."""
        self._closed.wait(seconds)

    def close(self) -> None:
        """The connection is everybody's: a follower that lost it waits for the link to have it again."""

    def detach(self) -> None:
        """Whoever reads is told to end."""
        self._closed.set()
        for exchange in list(self._asked):
            exchange.end(Detached("closed"))
