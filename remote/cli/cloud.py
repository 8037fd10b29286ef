"""The commands about rented machines that only look: offers and rented."""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from remote.cloud.provider import Provider
from surgvqa.config.workspace import Workspace
from surgvqa.outcome import Outcome
from surgvqa.terminal.drawing import plain
from surgvqa.terminal.figures import human_seconds

MISSING = "not at the provider"


def _provider() -> Provider:
    from remote.cloud.api_key import read_key
    from remote.cloud.lambda_cloud import LambdaCloud

    return LambdaCloud(read_key())


def offers(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """The price list, cheapest first, with whether this workspace's training is predicted to fit one card."""
    from surgvqa.config.options import BudgetOptions
    from surgvqa.config.resolve import resolve
    from surgvqa.memory.predict import predict_options

    options: Any = resolve("budget", {}, workspace).options
    assert isinstance(options, BudgetOptions)
    needed = predict_options(options).predicted_reserved_gb
    rows: list[dict[str, Any]] = [
        {
            "type": offer.type,
            "gpu": offer.gpu,
            "gpus": offer.gpus,
            "gpu_memory_gb": offer.gpu_memory_gb,
            "price_per_hour": offer.price_per_hour,
            "regions": list(offer.regions),
            "fits": None if offer.gpu_memory_gb is None else needed <= offer.gpu_memory_gb,
        }
        for offer in sorted(_provider().offers(), key=lambda offer: (offer.price_per_hour, offer.type))
    ]

    def show(console: Console) -> None:
        table = Table("type", "GPU", "a card", "per hour", "free now in", "fits", box=None)
        table.columns[0].no_wrap = True
        for row in rows:
            memory = "" if row["gpu_memory_gb"] is None else f"{row['gpu_memory_gb']:g} GB"
            fits = {True: "yes", False: "no", None: "unknown"}[row["fits"]]
            cells = (row["type"], f"{row['gpus']} × {row['gpu']}", memory, f"${row['price_per_hour']:.2f}")
            table.add_row(*map(plain, (*cells, ", ".join(row["regions"]) or "nowhere", fits)))
        console.print(table if rows else "the provider offers nothing")
        console.print(plain(f"fits: this workspace's training, {needed:.1f} GB predicted, on one card"))

    return Outcome({"offers": rows, "predicted_reserved_gb": needed}, show=show)


def rented(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """What is rented: the ledger beside the provider's list. Not ok when they differ: money may be running unseen."""
    from remote.cloud.ledger import Ledger
    from remote.cloud.renting import reconcile

    found, now = reconcile(_provider(), Ledger()), time.time()
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
    orphans = [
        {"id": m.id, "name": m.name, "state": m.state, "type": m.type, "region": m.region,
         "price_per_hour": m.price_per_hour}
        for m in found.orphans
    ]  # fmt: skip
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
            text = f"RUNS, BUT WAS NOT RENTED FROM HERE: {orphan['name']} ({orphan['type']}, {orphan['state']})"
            console.print(plain(text), style="bold red")
        for row in missing:
            console.print(plain(f"{row['name']}: rented, but the provider lists no such machine; look at its console"))

    return Outcome({"rented": rows, "orphans": orphans}, ok=not orphans and not missing, show=show)
