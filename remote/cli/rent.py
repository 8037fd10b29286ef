"""`surgvqa-remote rent` and `end`: a machine from the price list to a host, and from results at home to its end."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from remote.cloud import host_entry
from remote.cloud.ledger import Ledger, Record, this_laptop
from remote.cloud.provider import Machine, NoCapacity, Offer, Provider, SystemClock, Unanswered
from remote.ssh.hosts import resolve
from remote.ssh.patience import PATIENCE_S, Patience
from surgvqa.cli.main import say
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run
from surgvqa.terminal.drawing import plain

BOOT_WITHIN_S = 1200.0
LOOK_FOR_CAPACITY_EVERY_S = 20.0
EVERYTHING = "all"


def rent(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Rents a machine, waits for it, and makes it a host; with a job also sets it up, uploads and launches that.

    Said again after an interruption, it goes on from there.
    """
    from remote.cli.commands import job_of
    from remote.cli.then import refuse_without_then

    if not arguments.then:
        refuse_without_then(arguments)
    elif not arguments.job:
        raise UsageError("--then: name the job that it follows: rent TYPE train … --then …")
    name = arguments.name or arguments.type.lower().replace("_", "-")[:40]
    ledger = Ledger()
    before = ledger.read(name)
    if arguments.job:
        from remote.cli import then
        from remote.jobs.launch import check_command

        check_command(arguments.job[0])
        if before and not before.open and (bill := then.not_told(before)):
            return bill  # it was interrupted between the machine's end and this line
    if before and before.open and before.type != arguments.type:
        raise UsageError(f"{name}: a {before.type} is rented under this name; choose another: --name")
    host_entry.check_free(name, workspace.root)
    identity = host_entry.identity(arguments.identity_file)
    ready = job_of("rent", arguments, workspace, lambda run: _rent(name, before, identity, arguments, workspace, run))
    if arguments.detach:
        return ready
    words = [["setup", name]] * (arguments.setup or bool(arguments.job))
    words += [["upload", name]] * (arguments.upload or bool(arguments.job))
    if arguments.job:
        words.append(["launch", name, *_then_words(arguments)])
    done = [ready]
    while words and done[-1].ok:
        done.append(_go_on(words.pop(0), arguments.job, workspace))
    if not done[-1].ok and not arguments.job:
        say(f"surgvqa-remote: {name} stays rented; its end: surgvqa-remote end {name}")
    if arguments.job and not words:
        return Outcome({**ready.data, **done[-1].data}, ok=done[-1].ok, show=done[-1].show)
    return Outcome(ready.data, ok=done[-1].ok, show=ready.show)


def _rent(
    name: str,
    before: Record | None,
    identity: tuple[Path, str],
    arguments: argparse.Namespace,
    workspace: Workspace,
    run: Run,
) -> Outcome:
    import hashlib

    from remote.cli import cloud
    from remote.cloud import renting

    key_file, public_key = identity
    ledger, clock = Ledger(), SystemClock()
    provider = cloud.provider_of("local" if arguments.type == "local" else "lambda")
    offer = _offer(provider, arguments) if not (before and before.open) else _as_offer(before)
    price = f"${offer.price_per_hour:.2f}"
    run.phase("rent", f"{name}: {offer.type} in {offer.regions[0]}, {price} an hour until it is ended")
    short = hashlib.sha256(" ".join(public_key.split()[:2]).encode()).hexdigest()[:8]
    key = provider.add_key(f"surgvqa-{this_laptop()}-{short}", public_key)
    record = renting.rent(provider, ledger, clock, offer, offer.regions[0], name, key)
    run.phase("boot", f"{record.type}, asked for {time.strftime('%H:%M', time.localtime(record.asked))}")
    machine = renting.wait_active(provider, clock, record, BOOT_WITHIN_S)
    if renting.reprice(ledger, record, machine):
        over = arguments.max_price is not None and record.price_per_hour > arguments.max_price
        limit = (
            f", more than --max_price {arguments.max_price:g}: end it with surgvqa-remote end {name}" if over else ""
        )
        run.warning(f"{name} costs ${record.price_per_hour:.2f} an hour by the provider's own word, not {price}{limit}")
    host_entry.write(record, machine, provider.user, key_file)
    run.phase("connect", machine.address)
    trust = _first_contact(name, machine, workspace, run)
    following = f"surgvqa-remote {'launch' if arguments.upload else 'upload' if arguments.setup else 'setup'} {name}"
    data = {
        "name": name,
        "address": machine.address,
        "port": machine.port,
        "type": record.type,
        "region": record.region,
        "price_per_hour": record.price_per_hour,
        "host_key": trust,
        "next": following,
    }
    text = f"{name}: ready at {machine.address}. {trust}\nnext: {following}\nits end: surgvqa-remote end {name}"
    return Outcome(data, show=lambda console: console.print(plain(text)))


def _then_words(arguments: argparse.Namespace) -> list[str]:
    """What of a job's options `launch` is to be told."""
    words = ["--then", ",".join(arguments.then)] if arguments.then else []
    for name in ("max_cost", "max_hours"):
        if getattr(arguments, name) is not None:
            words += [f"--{name}", repr(getattr(arguments, name))]
    words += ["--end_from", arguments.end_from, *(["--results", arguments.results] if arguments.results else [])]
    words += ["--discard", ",".join(arguments.discard)] if arguments.discard else []
    return words + ["--sync"] * arguments.sync


def _offer(provider: Provider, arguments: argparse.Namespace) -> Offer:
    """The asked type with one region where it is free, waited for as long as --wait says."""
    until = time.monotonic() + arguments.wait
    while True:
        try:
            offers = {offer.type: offer for offer in provider.offers()}
        except Unanswered:
            if time.monotonic() >= until:
                raise
            time.sleep(LOOK_FOR_CAPACITY_EVERY_S)
            continue
        offer = offers.get(arguments.type)
        if offer is None:
            raise UsageError(f"{arguments.type}: not on the price list: {', '.join(sorted(offers)) or 'it is empty'}")
        if arguments.max_price is not None and offer.price_per_hour > arguments.max_price:
            limit = f"--max_price {arguments.max_price:g}"
            raise SurgvqaError(f"{offer.type}: costs ${offer.price_per_hour:.2f} an hour, more than {limit}")
        free = [region for region in offer.regions if arguments.region in (None, region)]
        if free:
            return Offer(offer.type, offer.gpu, offer.gpus, offer.gpu_memory_gb, offer.price_per_hour, (free[0],))
        if time.monotonic() >= until:
            where = f"in {arguments.region}" if arguments.region else "anywhere"
            raise NoCapacity(f"{offer.type}: none is free {where} now; wait for one: --wait SECONDS")
        time.sleep(min(LOOK_FOR_CAPACITY_EVERY_S, max(0.0, until - time.monotonic())))


def _as_offer(record: Record) -> Offer:
    return Offer(record.type, "", 1, None, record.price_per_hour, (record.region,))


def _first_contact(name: str, machine: Machine, workspace: Workspace, run: Run) -> str:
    """Connects, and says how far the host's key can be trusted."""
    from remote.ssh.connection import Remote
    from remote.ssh.host_keys import UnknownHostKey

    patience = Patience(300.0, run.warning)
    remote = Remote(resolve(name, workspace.root), patience)
    try:
        try:
            remote.patiently(remote.open)
        except UnknownHostKey as unknown:
            if machine.host_key:
                host_entry.vouch(name, workspace.root, machine.host_key)
                remote.patiently(remote.open)
                return "Its host key is the one that the provider told."
            unknown.remember()
            remote.patiently(remote.open)
            return (
                f"Its host key {unknown.fingerprint} was accepted at first contact: the provider tells none, so "
                "whoever answered at this address is trusted from now on. If in doubt, compare it on its console."
            )
        return "Its host key is known already."
    finally:
        remote.close()


def _go_on(words: list[str], job: list[str], workspace: Workspace) -> Outcome:
    from remote.cli import commands
    from remote.cli.parser import build_parser

    arguments = build_parser().parse_args([*words, "--workspace", str(workspace.root)])
    arguments.job = job
    does = {"setup": commands.set_up, "upload": commands.upload, "launch": commands.launch}
    return does[words[0]](arguments, workspace)


def end(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Fetches what is on the machine, verified, then ends it; returns when the provider says that it has ended."""
    from remote.cli.commands import job_of

    record = Ledger().read(arguments.name)
    if record is None:
        raise UsageError(f"{arguments.name}: nothing of this name was rented from here; see surgvqa-remote rented")
    return job_of("end", arguments, workspace, lambda run: _end(record, arguments, workspace, run))


def _end(record: Record, arguments: argparse.Namespace, workspace: Workspace, run: Run) -> Outcome:
    from remote.cli import cloud
    from remote.cloud import renting

    name, fetched = record.name, list[str]()

    def unfetched() -> list[str]:
        if EVERYTHING not in arguments.discard and (
            left := _bring_home(record, workspace, set(arguments.discard), fetched, run)
        ):
            return left
        run.phase("terminate", name)
        return []

    provider, clock = cloud.provider_of(record.provider), SystemClock()
    ended = renting.end(provider, Ledger(), clock, name, unfetched, arguments.forget)
    host_entry.remove(ended)
    cost = ended.cost(clock.time())
    data = {"name": name, "state": ended.state, "fetched": fetched, "cost": round(cost, 2)}
    text = f"{name}: {ended.state}; ${cost:.2f} by our clock, the provider's bill counts"
    return Outcome(data, show=lambda console: console.print(plain(text)))


def _bring_home(record: Record, workspace: Workspace, discard: set[str], fetched: list[str], run: Run) -> list[str]:
    """Fetches every run of the machine but those of `discard`; returns what could not be fetched, and why."""
    from remote.cli.then import host_of
    from remote.jobs.home import bring_home
    from remote.ssh.connection import connect

    host = host_of(record.name, record.label, workspace)
    try:
        with connect(host, workspace.root, patience=Patience(PATIENCE_S, run.warning)) as remote:
            return bring_home(remote, workspace.runs_dir, run, discard, fetched, PATIENCE_S)
    except SurgvqaError as error:
        lose = f"to lose what is there: end {record.name} --discard all"
        raise SurgvqaError(f"{record.name}: NOT ENDED: {error}; {lose}") from None
