"""What is rented from here, by the ledger and the plans alone: no network."""

from __future__ import annotations

import time
from dataclasses import dataclass

from remote.agent.protocol import IDLE_S
from remote.cloud.ledger import Ledger
from remote.cloud.plan import Plans
from surgvqa.errors import SurgvqaError


@dataclass(frozen=True)
class Rented:
    """One machine that may cost money now."""

    name: str
    """The host's."""
    type: str
    price_per_hour: float
    cost: float
    """US dollars until now, by our clock."""
    planned: bool
    """Whether a plan (`launch --then`) is under way for it."""
    not_ended: bool
    """Whether its end was asked for, and the provider has not said that it has ended."""
    idle_s: float
    """For how long it has done nothing since its job ended, while its plan waits for something; 0 if it is not idle."""


def rented() -> list[Rented]:
    """All that can be read."""
    ledger, now, found = Ledger(), time.time(), []
    plans = Plans(ledger)
    for record in ledger.records():
        if record.open:
            try:
                plan = plans.of(record)
            except SurgvqaError:
                plan = None
            going, asked = plan is not None and plan.going, record.end_asked is not None
            idle_s = plan.idle_s(now) if plan else 0.0
            idle_s = idle_s if idle_s >= IDLE_S else 0.0
            cost = record.cost(now)
            found.append(Rented(record.name, record.type, record.price_per_hour, cost, going, asked, idle_s))
    return found
