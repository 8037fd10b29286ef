"""The processes that share a run: one, or several that torchrun has started, each with a GPU of its own (its ranks).

Standard library only: this is what a process alone has. machine/ranks.py has the rest.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from surgvqa.errors import UsageError

FROM_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
HOST_VARIABLE = "SURGVQA_HOST"
"""What the machine is called in the events of a run of several; `surgvqa-remote launch` sets it."""


def rank_and_count() -> tuple[int, int]:
    """(this process's rank, how many there are), as torchrun tells each process it starts; (0, 1) without it."""
    values: dict[str, str | None] = {name: os.environ.get(name) for name in FROM_TORCHRUN}
    if not all(values.values()):
        return 0, 1
    try:
        rank, count = int(str(values["RANK"])), int(str(values["WORLD_SIZE"]))
    except ValueError:
        return 0, 1
    return (rank, count) if count > 1 else (0, 1)


@dataclass(frozen=True)
class Nodes:
    """The machines that train together, each with its ranks."""

    count: int
    node: int
    """Which of them this is; 0 has the run folder."""
    endpoint: str
    """HOST:PORT of machine 0, where all of them meet."""
    id: str

    def environment(self) -> dict[str, str]:
        """As torchrun reads them too."""
        values = (("NNODES", self.count), ("NODE_RANK", self.node), ("RDZV_ENDPOINT", self.endpoint))
        return {f"PET_{name}": str(value) for name, value in (*values, ("RDZV_ID", self.id))}


def nodes_asked() -> Nodes | None:
    """The machines that `surgvqa train` is to train on together with this one, as torchrun's own variables name them;
    None for this one alone. UsageError for malformed ones."""
    values = {name: os.environ.get(f"PET_{name}", "") for name in ("NNODES", "NODE_RANK", "RDZV_ENDPOINT", "RDZV_ID")}
    if values["NNODES"] in ("", "1"):
        return None
    try:
        count, node = int(values["NNODES"]), int(values["NODE_RANK"])
    except ValueError:
        count = node = 0
    if not 0 <= node < count or not values["RDZV_ENDPOINT"] or not values["RDZV_ID"]:
        raise UsageError(
            f"PET_NNODES is {values['NNODES']!r}: expected numbers in it and in PET_NODE_RANK, and PET_RDZV_ENDPOINT "
            "and PET_RDZV_ID; or start with torchrun"
        )
    return Nodes(count, node, values["RDZV_ENDPOINT"], values["RDZV_ID"])


def this_node() -> tuple[int, str]:
    """(the number of this machine among those that train together, its name); torchrun tells each process the first."""
    number = os.environ.get("GROUP_RANK", "0")
    return int(number) if number.isdecimal() else 0, os.environ.get(HOST_VARIABLE) or platform.node()


def node_run(run_id: str, node: int) -> str:
    """The id of a run's folder on machine `node`; on the first one it is the run's own."""
    return f"{run_id}-node{node}" if node else run_id


def run_of(run_id: str) -> str:
    """The run that a folder belongs to: `run_id` itself, or of what `node_run` names the run."""
    return re.sub(r"-node[1-9][0-9]*$", "", run_id)


class Passes(Protocol):
    """The passes through a model that all ranks make together, because it is divided among them (model/divide.py)."""

    def take_part(self, backward: bool) -> None:
        """A pass of the others, without a sample."""
        ...

    def complete(self) -> None:
        """Ends this rank's part in a pass that was interrupted."""
        ...


class Ranks:
    """A process alone. What several do together it does by itself."""

    rank = 0
    count = 1
    node = 0
    """The number of its machine."""
    hosts: Sequence[str] = ()
    """The machine of each rank by name, where there are several machines."""
    beside: Sequence[int] = (0,)
    """The ranks of its machine."""
    disconnected = False
    """Whether this rank has failed, or has lost another: nothing is shared any more."""
    passes: Passes | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes: the lowest one that lives."""
        return self.rank == 0

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of its machine: the one that writes what the machine needs once."""
        return self.rank == self.beside[0]

    def name(self, rank: int) -> str:
        """'rank 1: ', to stand before what only that rank says; nothing where there is one rank."""
        return f"rank {rank}: " if self.count > 1 else ""

    def share(self, value: Any, what: str) -> list[Any]:
        """The values of all ranks, in their order, once each has come here. `value` is JSON; `what` names the place."""
        return [value]

    def begin_pass(self, backward: bool) -> bool:
        """Begins a pass through a divided model, once each rank has come to one or to `share`, where it takes part
        without a sample. Whether gradients are computed: `backward`, or what another rank says."""
        return backward

    def last(self, value: Any) -> list[Any]:
        """As `share`, at the end of the work: from now on nobody is watched."""
        return [value]

    def look(self) -> None:
        """Raises SurgvqaError when another rank has failed or its process is gone."""

    def watch(self, abort: Callable[[], None]) -> None:
        """From now on others are looked at by themselves; `abort` is called when one is lost."""

    def cause_of(self, error: Exception) -> Exception:
        """`error`, or the loss of another rank that has brought it about."""
        return error

    def leave(self, why: str) -> None:
        """This rank fails: the others are told."""
