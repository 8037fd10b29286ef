"""The interface of a provider of machines: a price list, a list of our machines, launch and terminate."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from surgvqa.errors import SurgvqaError

ALIVE = ("booting", "active", "unhealthy", "terminating", "unknown")
"""States of a machine that may cost money: all except terminated, including unknown ones."""


class CloudError(SurgvqaError):
    """The provider refused or failed. `code` is the provider's error code, or ""."""

    def __init__(self, text: str, code: str = ""):
        self.code = code
        super().__init__(text)


class NoCapacity(CloudError):
    """The provider has no free machine of this type in this region now."""


class Unanswered(CloudError):
    """The provider was not reached or failed, however often it was asked. It may answer later."""


class AnswerLost(CloudError):
    """A launch was sent but not answered, so a machine may have started."""


@dataclass(frozen=True)
class Offer:
    """One type of machine on the price list."""

    type: str
    gpu: str
    gpus: int
    gpu_memory_gb: float | None
    """Memory of one card, or None if the provider does not say."""
    price_per_hour: float
    """US dollars for the complete machine."""
    regions: tuple[str, ...]
    """Regions in which one is free now."""


@dataclass(frozen=True)
class Machine:
    """One rented machine, as reported by the provider."""

    id: str
    name: str
    state: str
    """booting, active, unhealthy, terminating, terminated; unknown for any other word."""
    address: str
    """"" until it has one."""
    type: str
    region: str
    price_per_hour: float | None
    port: int = 22
    host_key: str = ""
    """The public key of its sshd, if the provider publishes it."""


class Provider(Protocol):
    """Each method raises CloudError if the provider does not answer or refuses."""

    name: str
    user: str
    """The user name for logging in to its machines."""
    settles_s: float
    """Seconds after which an unanswered launch without a machine of its name counts as failed."""

    def offers(self) -> list[Offer]: ...

    def machines(self) -> list[Machine]:
        """All machines of the account that are not terminated, including those that are not ours."""
        ...

    def machine(self, machine_id: str) -> Machine | None:
        """The machine, or None if the provider does not list it (any more)."""
        ...

    def add_key(self, name: str, public_key: str) -> str:
        """Adds `public_key` to the account and returns its name there."""
        ...

    def launch(self, offer: str, region: str, name: str, key: str) -> str:
        """Asks once for one machine; returns its id. NoCapacity; AnswerLost when it may have started all the same."""
        ...

    def terminate(self, machine_id: str) -> None:
        """Requests termination. Only `machine` tells whether the machine has ended."""
        ...


class Clock(Protocol):
    """A clock that tests can replace, so that they need not wait."""

    def time(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def time(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
