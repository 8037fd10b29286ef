"""One intention, one machine: launch, find again, end, and compare the ledger with the provider."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from remote.cloud.ledger import Ledger, Record, this_laptop
from remote.cloud.provider import AnswerLost, Clock, CloudError, Machine, NoCapacity, Offer, Provider, Unanswered
from surgvqa.errors import SurgvqaError

PREFIX = "surgvqa-"
LOOK_EVERY_S = 10.0
LOST_S = 120.0
"""Seconds during which an unanswered launch is looked up by its name."""
END_TRIES = 5
END_WITHIN_S = 300.0
"""Seconds to wait for the state terminated after each request."""
NOT_LISTED = "not listed by the provider"
ENDING = ("terminating", "terminated", "unknown here")
"""Nothing can be fetched from such a machine."""


def rent(provider: Provider, ledger: Ledger, clock: Clock, offer: Offer, region: str, name: str, key: str) -> Record:
    """Launches `name`, or finds what an earlier call launched: a machine of this name is never asked for twice.

    Raises NoCapacity or CloudError when the provider refused, AnswerLost when it is not known whether one started.
    """
    with ledger.locked(name):
        record = ledger.read(name)
        if record and record.state == "rented":
            return record
        if record and record.state == "asked":
            record = _found_again(provider, ledger, clock, record)
            if record.open:
                return record
        label = f"{PREFIX}{this_laptop()}-{name}-{secrets.token_hex(4)}"
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
    """`record` with its machine, or closed as lost once `settles_s` have passed; AnswerLost before that.

    It is looked for a while in any case: a clock that was just set must not make a launch look old.
    """
    until = clock.time() + min(LOST_S, provider.settles_s)
    while True:
        for machine in provider.machines():
            if machine.name == record.label:
                record.machine_id, record.state = machine.id, "rented"
                ledger.write(record)
                return record
        if clock.time() >= until:
            if clock.time() - record.asked >= provider.settles_s:
                record.state, record.ended = "lost", clock.time()
                ledger.write(record)
                return record
            raise AnswerLost(
                f"{record.name}: the launch got no answer, and no machine {record.label} is listed yet; it may still "
                f"come. Ask again in {provider.settles_s / 60:g} minutes, or rent under another name"
            )
        clock.sleep(LOOK_EVERY_S)


def wait_active(provider: Provider, clock: Clock, record: Record, within_s: float) -> Machine:
    """The machine once it is active and has an address. SurgvqaError when it does not come up; it costs money then."""
    since = clock.time()
    until, state = since + within_s, NOT_LISTED
    while True:
        with contextlib.suppress(Unanswered):  # it passes; what it was last stays
            machine = provider.machine(record.machine_id)
            state = machine.state if machine else NOT_LISTED
            if machine and state == "active" and machine.address:
                return machine
        missing = state == NOT_LISTED and clock.time() - since >= LOST_S  # one just launched may be listed late
        if missing or state in ("unhealthy", "terminating", "terminated"):
            raise SurgvqaError(f"{record.name}: the machine is {state}; end it: surgvqa-remote end {record.name}")
        if clock.time() >= until:
            raise SurgvqaError(f"{record.name}: still {state} after {within_s:g} s; it costs money until it is ended")
        clock.sleep(LOOK_EVERY_S)


def reprice(ledger: Ledger, record: Record, machine: Machine) -> bool:
    """Whether the provider asks another price for the machine than its offer did; the record then has that one."""
    if machine.price_per_hour is None or machine.price_per_hour == record.price_per_hour:
        return False
    record.price_per_hour = machine.price_per_hour
    ledger.write(record)
    return True


def end(
    provider: Provider,
    ledger: Ledger,
    clock: Clock,
    name: str,
    unfetched: Callable[[], list[str]],
    forget: bool = False,
) -> Record:
    """Terminates `name` and returns only when the provider says terminated, with the record closed.

    `unfetched`: results that are on the machine alone. SurgvqaError when there are any, before anything is asked.
    `forget`: the caller's word that a machine which the provider does not know has ended.
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
            if not record.open:
                return record
        state = machine_state(provider, record)
        if state == "unknown here" and not record.ending:
            if not forget:
                raise CloudError(
                    f"{name}: NOT ENDED: {provider.name} lists no machine {record.machine_id}, and was not seen ending "
                    "it; is this the key of the account that rented it? If it has ended, close its record with --forget"
                )
            record.state, record.ended = "ended", clock.time()
            ledger.write(record)
            return record
        if state not in ENDING and (left := unfetched()):
            raise SurgvqaError(f"{name}: results are not fetched yet: {', '.join(left)}; fetch them, or discard them")
        problem = "the provider does not say terminated"
        for _ in range(END_TRIES):
            try:
                if record.end_asked is None:
                    record.end_asked = clock.time()
                    ledger.write(record)
                elif _has_ended(provider, ledger, clock, record, within_s=0.0):
                    break
                provider.terminate(record.machine_id)
                if _has_ended(provider, ledger, clock, record):
                    break
            except CloudError as error:
                problem = str(error)
                clock.sleep(LOOK_EVERY_S)
        else:
            raise CloudError(f"{name}: NOT ENDED, it goes on costing ${record.price_per_hour:.2f} an hour: {problem}")
        record.state, record.ended = "ended", clock.time()
        ledger.write(record)
        return record


def _has_ended(
    provider: Provider, ledger: Ledger, clock: Clock, record: Record, within_s: float = END_WITHIN_S
) -> bool:
    """Waits for it. A machine that we asked to end and that the provider then knows no more, looked at twice, ended."""
    until, unknown = clock.time() + within_s, 0
    while True:
        state = machine_state(provider, record)
        if state == "terminating" and not record.ending:
            record.ending = True
            ledger.write(record)
        unknown = unknown + 1 if state == "unknown here" else 0
        if state == "terminated" or unknown == 2:
            return True
        if clock.time() >= until and not unknown:
            return False
        clock.sleep(LOOK_EVERY_S)


def machine_state(provider: Provider, record: Record) -> str:
    """The machine's state; "unknown here" when neither its id nor its label is one of this account."""
    machine = provider.machine(record.machine_id)
    if machine:
        return machine.state
    listed = [m for m in provider.machines() if record.machine_id == m.id or record.label == m.name]
    return listed[0].state if listed else "unknown here"


@dataclass
class Reconciled:
    """The ledger compared with the provider's list."""

    rented: list[tuple[Record, Machine | None]]
    """Open records; None where the provider lists no such machine."""
    orphans: list[Machine]
    """Machines of this laptop without an open record. They cost money, and no plan of this laptop will end them."""
    others: list[Machine]
    """All other machines of the account, of another laptop or renamed or not rented with us: listed, never touched."""


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
    unknown = [m for m in machines if m.id not in known]
    mine = [m for m in unknown if m.name.startswith(f"{PREFIX}{this_laptop()}-")]
    return Reconciled(rented, mine, [m for m in unknown if m not in mine])
