"""What a provider of machines is to us: a price list, a list of our machines, launch and terminate."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from surgvqa.errors import SurgvqaError

ALIVE = ("booting", "active", "unhealthy", "terminating", "unknown")
"""States of a machine that may cost money: all but terminated, and those that we do not know."""


class CloudError(SurgvqaError):
    """The provider refused or failed. `code` is its own word for why, "" when it gave none."""

    def __init__(self, text: str, code: str = ""):
        self.code = code
        super().__init__(text)


class NoCapacity(CloudError):
    """The provider has no such machine free there now."""


class AnswerLost(CloudError):
    """A launch was sent and its answer never came: a machine may have started."""


@dataclass(frozen=True)
class Offer:
    """One type of machine on the price list."""

    type: str
    gpu: str
    gpus: int
    gpu_memory_gb: float | None
    """Of one card; None when the provider does not say."""
    price_per_hour: float
    """US dollars, of the whole machine."""
    regions: tuple[str, ...]
    """Where one is free now."""


@dataclass(frozen=True)
class Machine:
    """One rented machine, as the provider sees it."""

    id: str
    name: str
    state: str
    """booting, active, unhealthy, terminating, terminated; unknown for any other word."""
    address: str
    """"" until it has one."""
    type: str
    region: str
    price_per_hour: float | None


class Provider(Protocol):
    """Each method raises CloudError when the provider cannot be asked or refuses."""

    name: str
    user: str
    """Who logs in to its machines."""

    def offers(self) -> list[Offer]: ...

    def machines(self) -> list[Machine]:
        """Those of the account, ours or not, that are not terminated."""
        ...

    def machine(self, machine_id: str) -> Machine | None:
        """None when the provider knows no such machine (any more)."""
        ...

    def add_key(self, name: str, public_key: str) -> str:
        """Makes `public_key` known; returns the name under which the account has it."""
        ...

    def launch(self, offer: str, region: str, name: str, key: str) -> str:
        """Asks once for one machine; returns its id. NoCapacity; AnswerLost when it may have started all the same."""
        ...

    def terminate(self, machine_id: str) -> None:
        """Asks for its end. Only `machine` tells whether it has ended."""
        ...


class Clock(Protocol):
    """Time, so that tests need not wait."""

    def time(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def time(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
