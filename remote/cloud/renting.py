"""One intention, one machine: launch, find again, end, and compare the ledger with the provider."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from remote.cloud.ledger import Ledger, Record
from remote.cloud.provider import AnswerLost, Clock, CloudError, Machine, NoCapacity, Offer, Provider
from surgvqa.errors import SurgvqaError

PREFIX = "surgvqa-"
LOOK_EVERY_S = 10.0
LOST_S = 120.0
"""Seconds in which a launch without an answer is looked for by its name."""
END_TRIES = 5
END_WITHIN_S = 300.0
"""Seconds for the provider to say terminated, after each time it was asked."""


def rent(provider: Provider, ledger: Ledger, clock: Clock, offer: Offer, region: str, name: str, key: str) -> Record:
    """Launches `name`, or finds what an earlier call launched: a machine of this name is never asked for twice.

    Raises NoCapacity or CloudError when the provider refused, AnswerLost when it is not known whether one started.
    """
    with ledger.locked(name):
        record = ledger.read(name)
        if record and record.state == "rented":
            return record
        if record and record.state == "asked":
            return _found_again(provider, ledger, clock, record)
        label = f"{PREFIX}{name}-{secrets.token_hex(4)}"
        record = Record(name, provider.name, label, offer.type, region, offer.price_per_hour, clock.time())
        ledger.write(record)
        try:
            record.machine_id = provider.launch(offer.type, region, label, key)
        except AnswerLost:
            return _found_again(provider, ledger, clock, record)
        except (NoCapacity, CloudError):
            record.state, record.ended = "refused", clock.time()
            ledger.write(record)
            raise
        record.state = "rented"
        ledger.write(record)
        return record


def _found_again(provider: Provider, ledger: Ledger, clock: Clock, record: Record) -> Record:
    until = clock.time() + LOST_S
    while True:
        for machine in provider.machines():
            if machine.name == record.label:
                record.machine_id, record.state = machine.id, "rented"
                ledger.write(record)
                return record
        if clock.time() >= until:
            raise AnswerLost(
                f"{record.name}: the launch got no answer and no machine {record.label} is there; it may still come. "
                "Rent under another name, and look at the provider's console"
            )
        clock.sleep(LOOK_EVERY_S)


def wait_active(provider: Provider, clock: Clock, record: Record, within_s: float) -> Machine:
    """The machine once it is active and has an address. SurgvqaError when it does not come up; it costs money then."""
    until = clock.time() + within_s
    while True:
        machine = provider.machine(record.machine_id)
        state = machine.state if machine else "terminated"
        if machine and state == "active" and machine.address:
            return machine
        if state in ("unhealthy", "terminating", "terminated"):
            raise SurgvqaError(f"{record.name}: the machine is {state}; end it: surgvqa-remote end {record.name}")
        if clock.time() >= until:
            raise SurgvqaError(f"{record.name}: still {state} after {within_s:g} s; it costs money until it is ended")
        clock.sleep(LOOK_EVERY_S)


def end(provider: Provider, ledger: Ledger, clock: Clock, name: str, unfetched: Callable[[], list[str]]) -> Record:
    """Terminates `name` and returns only when the provider says terminated, with the record closed.

    `unfetched`: results that are on the machine alone. SurgvqaError when there are any, before anything is asked.
    Raises CloudError when the provider does not end the machine: it goes on costing money.
    """
    with ledger.locked(name):
        record = ledger.read(name)
        if record is None:
            raise SurgvqaError(f"{name}: nothing of this name was rented from here")
        if not record.open:
            return record
        if record.state == "asked":
            record = _found_again(provider, ledger, clock, record)
        if left := unfetched():
            raise SurgvqaError(f"{name}: results are not fetched yet: {', '.join(left)}; fetch them, or discard them")
        problem = "the provider does not say terminated"
        for _ in range(END_TRIES):
            try:
                if _gone(provider, record):
                    break
                provider.terminate(record.machine_id)
                until = clock.time() + END_WITHIN_S
                while not (gone := _gone(provider, record)) and clock.time() < until:
                    clock.sleep(LOOK_EVERY_S)
                if gone:
                    break
            except CloudError as error:
                problem = str(error)
                clock.sleep(LOOK_EVERY_S)
        else:
            raise CloudError(f"{name}: NOT ENDED, it goes on costing ${record.price_per_hour:.2f} an hour: {problem}")
        record.state, record.ended = "ended", clock.time()
        ledger.write(record)
        return record


def _gone(provider: Provider, record: Record) -> bool:
    machine = provider.machine(record.machine_id)
    return machine is None or machine.state == "terminated"


@dataclass
class Reconciled:
    """The ledger beside the provider's list."""

    rented: list[tuple[Record, Machine | None]]
    """Open records; None where the provider lists no such machine."""
    orphans: list[Machine]
    """Machines of ours that no open record knows: they cost money and nothing here will end them."""


def reconcile(provider: Provider, ledger: Ledger) -> Reconciled:
    """Changes nothing. Raises CloudError when the provider cannot be asked."""
    machines = provider.machines()
    opened = [record for record in ledger.records() if record.provider == provider.name and record.open]
    known: dict[str, Machine] = {}
    for record in opened:
        for machine in machines:
            if machine.id == record.machine_id or machine.name == record.label:
                known[machine.id] = machine
    by_label = {machine.name: machine for machine in machines}
    rented = [(record, known.get(record.machine_id) or by_label.get(record.label)) for record in opened]
    orphans = [m for m in machines if m.id not in known and m.name.startswith(PREFIX)]
    return Reconciled(rented, orphans)
