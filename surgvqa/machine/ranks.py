"""Several processes that train together: what they tell each other, and how they notice that one is gone.

They talk through the key-value store that torchrun starts with them, in JSON. Whatever has to be done by all of them at
the same step is agreed here first, so that a rank that has failed keeps nobody waiting in a collective of NCCL or gloo.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgvqa import __version__
from surgvqa.errors import SurgvqaError, first_line
from surgvqa.machine.heartbeat import SILENT_S, Heartbeat, PatientStore
from surgvqa.runs.folder import Run
from surgvqa.runs.process import process_identity
from surgvqa.runs.ranks import Ranks, rank_and_count, this_node

if TYPE_CHECKING:
    import torch

LOOK_EVERY_S = 1.0
"""Between two looks at the processes of the others, while waiting for them."""
POLL_S = 0.0005
"""Between two looks at a collective under way."""
ANSWER_S = 5.0
"""How long another rank has to notice that a collective has failed."""
PATIENCE_S = 1800.0
"""How long the others are waited for; a rank may have to compile, or to write a saved state to a slow disk."""
PASS = "pass"
"""Where the ranks meet before each pass through a divided model (model/divide.py)."""
SAID_BY_ANY = ("oom", "gpu", "memory")
"""Kinds of events that each rank has of its own. All others are the same on every rank, and rank 0 writes them."""


class RankLost(SurgvqaError):
    """Another rank has failed, was killed, or does not answer."""


class SharedRanks(Ranks):
    """One of several ranks.

    `store` is a torch.distributed Store that all of them see; `identity` tells whether a process of this machine lives
    (runs/process.py); `place` is the number and the name of this machine.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        count: int,
        patience_s: float = PATIENCE_S,
        identity: Callable[[int], str | None] = process_identity,
        place: tuple[int, str] = (0, ""),
    ):
        self.store, self.rank, self.count = store, rank, count
        self.patience_s = patience_s
        self.identity = identity
        self.node, self.host = place
        self.beside = list(range(count))
        self.hosts = []
        self.disconnected = False
        self.lost: RankLost | None = None
        """Why another rank is lost, once it is."""
        self._watched = True
        self.heartbeat: Heartbeat | None = None
        """Where there are several machines."""
        self._round = 0
        self._others: dict[int, dict[str, Any]] = {}
        """Machine, pid, identity and versions of each other rank."""
        self._gone: set[int] = set()
        """Machines that are lost."""

    def wait_for_all(self) -> None:
        """Waits for all ranks to come. From now on their processes are watched. SurgvqaError for other versions."""
        import torch

        versions = {"surgvqa": __version__, "torch": torch.__version__}
        me = {"node": self.node, "host": self.host, "pid": os.getpid(), "identity": self.identity(os.getpid())}
        found = self.share({**me, "versions": versions}, "start")
        self._others = {rank: other for rank, other in enumerate(found) if rank != self.rank}
        self.beside = [rank for rank, one in enumerate(found) if one["node"] == self.node]
        if len(self.beside) < self.count:
            self.hosts = [one["host"] for one in found]
        for rank, one in enumerate(found):
            for name, version in found[0]["versions"].items():
                if one["versions"][name] != version:
                    raise SurgvqaError(
                        f"{self._called(rank)} has {name} {one['versions'][name]} and rank 0 {version}; install the "
                        "same on all machines (surgvqa-remote setup)"
                    )

    @property
    def far(self) -> list[int]:
        """The ranks on other machines."""
        return [rank for rank in range(self.count) if rank not in self.beside]

    def _called(self, rank: int) -> str:
        return f"rank {rank} of {self.count}" + (f" on {self.hosts[rank]}" if self.hosts else "")

    @property
    def first(self) -> bool:
        return not any(self._lives(rank) for rank in range(self.rank))

    def share(self, value: Any, what: str) -> list[Any]:
        """The values of all ranks, in their order. Raises RankLost, with its number, when one does not come.

        While others are not yet here, because they have further passes to make, this rank takes part in these.
        """
        while True:
            if self.passes and not self.disconnected:
                self.passes.complete()
            found = self._meet(value, what)
            passes = [backward for place, backward in found if place == PASS]
            if not self.passes or not passes:
                return [said for _, said in found]
            self.passes.take_part(any(passes))

    def begin_pass(self, backward: bool) -> bool:
        return any(said for place, said in self._meet(backward, PASS) if place == PASS)

    def _meet(self, value: Any, what: str) -> list[list[Any]]:
        """(place, value) of all ranks. All are at the same place, but for those that wait while others make a pass."""
        if self.disconnected:
            raise self.lost or RankLost("this rank is on its own")
        self._round += 1
        try:
            self.store.set(f"{self._round} {self.rank}", json.dumps([what, value]))
            found = [[what, value] if rank == self.rank else self._from(rank, what) for rank in range(self.count)]
            # All who are here have read what was said before.
            self.store.delete_key(f"{self._round - 1} {self.rank}")
            for rank, (place, _) in enumerate(found):
                if place != what and PASS not in (place, what):
                    raise RankLost(f"rank {rank} has come to {place!r} and rank {self.rank} to {what!r}")
        except RankLost:
            self.disconnected = True
            raise
        except RuntimeError:  # the store itself is gone
            self.look()
            self.disconnected = True
            if self.node:  # it is on the first machine
                self._gone.add(0)
                raise RankLost(f"{self._called(0)}: its torchrun, or its machine, is gone") from None
            raise RankLost("torchrun, which started the ranks, is gone") from None
        return found

    def _from(self, rank: int, what: str) -> Any:
        import torch.distributed as dist

        key, since = f"{self._round} {rank}", time.monotonic()
        while True:
            try:
                self.store.wait([key], timedelta(seconds=LOOK_EVERY_S))
                return json.loads(self.store.get(key))
            except dist.DistStoreError:  # not yet
                self.look()
            if time.monotonic() - since > self.patience_s:
                raise RankLost(
                    f"{self._called(rank)} has not come to {what!r} within {self.patience_s:g} s: it hangs, or "
                    "is much slower than the others (--ddp_timeout)"
                )

    def look(self) -> None:
        """Raises RankLost when another rank has failed, with its reason, or when its process is gone."""
        for rank in self._others:
            why = self._failed(rank)
            if why is None and not self._lives(rank):
                why = "its process is gone: killed, or out of host memory?"
                if rank in self.far:
                    why = f"nothing has been heard of it for {SILENT_S:g} s: its machine or the network is gone"
            if why is not None:
                self.lost = RankLost(f"{self._called(rank)}: {why}")
                self.disconnected = True
                raise self.lost

    def watch(self, abort: Callable[[], None]) -> None:
        """From now on a thread looks at the others too, and calls `abort` when one is lost.

        For collectives in the midst of a pass: the main thread may wait there for the GPU, where it cannot look.
        """

        def look() -> None:
            while self._watched and not self.lost:
                with contextlib.suppress(RankLost):
                    self.look()
                time.sleep(LOOK_EVERY_S)
            if self._watched:
                abort()

        threading.Thread(target=look, name="watch", daemon=True).start()

    def _failed(self, rank: int) -> str | None:
        try:
            if self.store.check([f"failed {rank}"]):
                return str(bytes(self.store.get(f"failed {rank}")), "utf-8", "replace")
        except RuntimeError:  # the store is gone
            return None
        return None

    def _lives(self, rank: int) -> bool:
        """Of another machine's processes nothing can be seen: they are heard of, or not (machine/heartbeat.py)."""
        other = self._others.get(rank)
        if other is not None and rank in self.far:
            if self.heartbeat and self.heartbeat.silent(rank):
                self._gone.add(other["node"])
            return other["node"] not in self._gone
        if other is None or other["identity"] is None:
            return True
        return self.identity(other["pid"]) == other["identity"]

    def cause_of(self, error: Exception) -> Exception:
        """A collective of gloo or NCCL that fails does not say whose fault it is. All ranks that it fails on come here;
        the one that does not is named."""
        if self.disconnected or not isinstance(error, RuntimeError):
            return self.lost or error
        try:
            self.store.set(f"here {self.rank}", "")
            for rank in self._others:
                since = time.monotonic()
                while not self.store.check([f"here {rank}"]):
                    self.look()
                    if time.monotonic() - since > ANSWER_S:
                        return RankLost(f"{self._called(rank)} does not answer: {first_line(error)}")
                    time.sleep(0.1)
        except RankLost as lost:
            return lost
        except RuntimeError:  # the store is gone
            return error
        return error

    def leave(self, why: str) -> None:
        """This rank fails: the others are told why, unless it is their failure that ends this one."""
        if self.heartbeat:
            self.heartbeat.end()
        if not self.disconnected:
            self.disconnected = True
            try:
                self.store.set(f"failed {self.rank}", why)
            except RuntimeError:
                return  # the store is gone, and with it torchrun, which ends the others

    def last(self, value: Any) -> list[Any]:
        """As `share`, at the end: from now on nobody is watched."""
        self._watched = False
        if self.heartbeat and self.rank:
            self.heartbeat.end()
        found = self.share(value, "end")
        if self.heartbeat and not self.rank:  # it has all that the others said
            self.heartbeat.end()
        return found


class RunOfRank(Run):
    """The run as another rank than 0 sees it: it writes what only it knows, and all when it has become the first.

    On another machine than rank 0's the folder is that machine's own. The first rank there also writes into it how its
    part ended; what only a rank knows goes to rank 0's folder too.
    """

    def __init__(self, folder: Path, ranks: SharedRanks, workspace: Path | None = None):
        super().__init__(folder, workspace=workspace)
        self.ranks: SharedRanks = ranks

    def emit(self, kind: str, **fields: Any) -> None:
        """Appends an event of this rank. Those that rank 0 writes too are left to it, while it lives."""
        ends = kind in ("error", "finished")
        if kind in SAID_BY_ANY:
            super().emit(kind, rank=self.ranks.rank, **fields)
            if self.ranks.heartbeat and self.ranks.node:
                self.ranks.heartbeat.send({"kind": kind, **fields})
        elif (self.ranks.disconnected and self.ranks.first) or (ends and self.ranks.node and self.ranks.leads):
            super().emit(kind, **fields)


def common(store: Any) -> Any:
    """The part of torchrun's store in which the ranks talk to each other."""
    from torch.distributed import PrefixStore

    return PrefixStore("surgvqa", store)


def join(patience_s: float = PATIENCE_S) -> SharedRanks:
    """Meets the other ranks that torchrun has started. RankLost, with its number, for one that does not come."""
    from torch.distributed.rendezvous import rendezvous

    def connection() -> Any:
        return common(next(rendezvous("env://", *rank_and_count()))[0])

    rank, count = rank_and_count()
    ranks = SharedRanks(connection(), rank, count, patience_s, place=this_node())
    ranks.wait_for_all()
    if ranks.far:
        ranks.store = PatientStore(ranks.store)
        ranks.heartbeat = Heartbeat(connection(), rank, ranks.far)
        atexit.register(_exit_of, ranks)
    return ranks


def _exit_of(ranks: SharedRanks) -> None:
    """What gloo and NCCL still send to a lost machine would keep this process for half an hour."""
    if ranks.disconnected:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def same_weights(parameters: Iterable[torch.Tensor]) -> None:
    """Rank 0's values on every rank."""
    import torch.distributed as dist

    for parameter in parameters:
        dist.broadcast(parameter.data, 0)


def part() -> None:
    """Takes the collectives' connections down, once all ranks are done."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def add_gradients(parameters: Iterable[torch.Tensor], ranks: Ranks) -> None:
    """The sum over all ranks, in place; a rank without a gradient adds nothing. RankLost when one is gone meanwhile."""
    import torch
    import torch.distributed as dist

    waiting = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        waiting.append(dist.all_reduce(parameter.grad, async_op=True))
    looked = time.monotonic()
    for work in waiting:
        while not work.is_completed():  # one that waits for a lost machine would not come back
            if time.monotonic() - looked > LOOK_EVERY_S:
                ranks.look()
                looked = time.monotonic()
            time.sleep(POLL_S)
        work.wait()
