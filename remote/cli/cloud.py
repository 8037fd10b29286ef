"""The commands about rented machines that only look: offers and rented; and the providers by name."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from remote.cloud.estimate import MEASURED_ON, Work
from remote.cloud.provider import Offer, Provider
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError
from surgvqa.files import user_folder
from surgvqa.outcome import Outcome
from surgvqa.terminal.drawing import plain
from surgvqa.terminal.figures import human_seconds

MISSING = "not at the provider"


def provider_of(name: str = "lambda") -> Provider:
    if name == "local":
        from remote.cloud.local import LocalMachines

        return LocalMachines()
    from remote.cloud.api_key import read_key
    from remote.cloud.lambda_cloud import LambdaCloud

    return LambdaCloud(read_key(), pace_file=user_folder("state") / "lambda_pace")


def _has_key() -> bool:
    from remote.cloud.api_key import KEY_FILE, VARIABLE

    return bool(os.environ.get(VARIABLE, "").strip()) or KEY_FILE.expanduser().exists()


def offers(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """The price list, cheapest first, with whether this workspace's training is predicted to fit one card, and what it
    would take and cost there."""
    from surgvqa.config.options import BudgetOptions
    from surgvqa.config.resolve import resolve
    from surgvqa.memory.predict import predict_options

    options: Any = resolve("budget", {}, workspace).options
    assert isinstance(options, BudgetOptions)
    needed: float | None = None
    try:
        needed = predict_options(options).predicted_reserved_gb
        note = f"fits: this workspace's training, {needed:.1f} GB predicted, on one card"
    except SurgvqaError as error:  # the price list is worth something without it
        note = f"fits: not known; {error}"
    work, why_not = _work(workspace)
    rows: list[dict[str, Any]] = [
        {
            "type": offer.type,
            "gpu": offer.gpu,
            "gpus": offer.gpus,
            "gpu_memory_gb": offer.gpu_memory_gb,
            "price_per_hour": offer.price_per_hour,
            "regions": list(offer.regions),
            "fits": None if offer.gpu_memory_gb is None or needed is None else needed <= offer.gpu_memory_gb,
            **_estimate(work, offer),
        }
        for offer in sorted(provider_of().offers(), key=lambda offer: (offer.price_per_hour, offer.type))
    ]

    def show(console: Console) -> None:
        table = Table("type", "GPU", "a card", "per hour", "free now in", "fits", "takes", "costs", box=None)
        table.columns[0].no_wrap = True
        for row in rows:
            memory = "" if row["gpu_memory_gb"] is None else f"{row['gpu_memory_gb']:g} GB"
            fits = {True: "yes", False: "no", None: "unknown"}[row["fits"]]
            cells = (row["type"], f"{row['gpus']} × {row['gpu']}", memory, f"${row['price_per_hour']:.2f}")
            takes = "" if row["seconds"] is None else human_seconds(row["seconds"])
            costs = "" if row["cost"] is None else f"${row['cost']:.2f}"
            table.add_row(*map(plain, (*cells, ", ".join(row["regions"]) or "nowhere", fits, takes, costs)))
        console.print(table if rows else "the provider offers nothing")
        console.print(plain(note))
        guess = f"takes, costs: the training alone on one card, from what {MEASURED_ON} took, a guess for the others"
        console.print(plain(guess if work else f"takes, costs: not known; {why_not}"))

    return Outcome({"offers": rows, "predicted_reserved_gb": needed}, show=show)


def _work(workspace: Workspace) -> tuple[Work | None, str]:
    """This workspace's training, as far as its time depends on it; or why it is not known."""
    from surgvqa.config.options import TrainOptions
    from surgvqa.config.resolve import resolve
    from surgvqa.data.samples import read_samples
    from surgvqa.memory.clip import clip_of
    from surgvqa.model.sizes import Sizes, checkpoint_sizes

    try:
        options: Any = resolve("train", {}, workspace).options
        assert isinstance(options, TrainOptions)
        folder = options.model_name_or_path
        sizes = checkpoint_sizes(folder)[0] if Path(folder).is_dir() else Sizes()
        samples = len(read_samples(options.train_data_path))
        evaluated = len(read_samples(options.eval_data_path)) if options.eval_data_path else 0
    except SurgvqaError as error:
        return None, str(error)
    window = options.per_device_train_batch_size * options.gradient_accumulation_steps
    epochs = options.max_steps * window / samples if options.max_steps > 0 else options.num_train_epochs
    return Work(samples, evaluated, epochs, clip_of(sizes, options).tokens), ""


def _estimate(work: Work | None, offer: Offer) -> dict[str, float | None]:
    seconds = work.seconds(offer.gpu) if work else None
    cost = None if seconds is None else round(seconds / 3600 * offer.price_per_hour, 2)
    return {"seconds": None if seconds is None else round(seconds), "cost": cost}


def rented(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """What is rented: the ledger beside the provider's list. Not ok when they differ: money may be running unseen."""
    from remote.cloud.ledger import Ledger
    from remote.cloud.renting import PREFIX, Reconciled, reconcile

    ledger, now = Ledger(), time.time()
    damaged = ledger.damaged()
    names = ["local", "lambda"]
    only_local = all(record.provider == "local" or not record.open for record in ledger.records())
    if only_local and not damaged and not _has_key():
        names.remove("lambda")  # nothing was rented there
    every = [reconcile(provider_of(name), ledger) for name in names]
    found = Reconciled(*([row for one in every for row in getattr(one, part.name)] for part in fields(Reconciled)))
    rows: list[dict[str, Any]] = [
        {
            "name": record.name,
            "type": record.type,
            "region": record.region,
            "state": machine.state if machine else MISSING,
            "address": machine.address if machine else "",
            "age_s": round(now - record.asked, 1),
            "price_per_hour": record.price_per_hour,
            "cost": round(record.cost(now), 2),
        }
        for record, machine in found.rented
    ]
    orphans, others = (
        [
            {"id": m.id, "name": m.name, "state": m.state, "type": m.type, "region": m.region,
             "price_per_hour": m.price_per_hour}
            for m in machines
        ]
        for machines in (found.orphans, found.others)
    )  # fmt: skip
    missing = [row for row in rows if row["state"] == MISSING]

    def show(console: Console) -> None:
        table = Table("name", "type", "region", "state", "age", "per hour", "so far (a guess)", box=None)
        table.columns[0].no_wrap = True
        for row in rows:
            money = (f"${row['price_per_hour']:.2f}", f"${row['cost']:.2f}")
            age = human_seconds(row["age_s"])
            table.add_row(*map(plain, (row["name"], row["type"], row["region"], row["state"], age, *money)))
        console.print(table if rows else "nothing is rented from here")
        for orphan in orphans:
            text = f"RUNS, BUT NO RECORD KNOWS IT: {orphan['name']} ({orphan['type']}, {orphan['state']})"
            console.print(plain(text), style="bold red")
        for other in others:
            whose = "from another laptop" if str(other["name"]).startswith(PREFIX) else "not rented with surgvqa"
            called = other["name"] or other["id"]
            console.print(plain(f"{whose}: {called} ({other['type']}, {other['state']})"))
        for row in missing:
            console.print(plain(f"{row['name']}: rented, but the provider lists no such machine; look at its console"))
        for wrong in damaged:
            console.print(plain(f"A RECORD CANNOT BE READ: {wrong}"), style="bold red")

    data = {"rented": rows, "orphans": orphans, "others": others, "damaged": damaged}
    return Outcome(data, ok=not (orphans or missing or damaged), show=show)
