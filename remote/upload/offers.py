"""Asks the host about items, and sends only the parts of their manifests that the host lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from remote.agent.manifest import bucket_of, pack
from remote.ssh.connection import Remote
from remote.ssh.errors import not_understood
from remote.ssh.hosts import Host
from remote.upload.hashes import Item

ATTEMPTS = 4


class Asked(Protocol):
    """A connection, or the panel's substitute for one."""

    host: Host

    def ask(self, op: str, **params: Any) -> dict[str, Any]: ...


class Once:
    """A connection that asks only once: a request that may already have been carried out is not repeated."""

    def __init__(self, remote: Remote):
        self.host, self.ask = remote.host, remote.ask_once


def ask_of(remote: Asked, op: str, item: Item, **params: Any) -> dict[str, Any]:
    """The host's answer to one question about an item."""
    return _ask(remote, op, [item], lambda offers: {"item": offers[0], **params})


def ask_of_all(remote: Asked, op: str, items: Sequence[Item], **params: Any) -> dict[str, Any]:
    """The host's answer to one question about several items."""
    return _ask(remote, op, items, lambda offers: {"items": offers, **params})


def _ask(
    remote: Asked, op: str, items: Sequence[Item], params: Callable[[list[Any]], dict[str, Any]]
) -> dict[str, Any]:
    offers = [item.offer for item in items]
    for _ in range(ATTEMPTS):
        answer = remote.ask(op, **params(offers))
        if "want" not in answer:
            return answer
        wanted = answer["want"]
        if not isinstance(wanted, dict):
            raise not_understood(remote.host, f"it wants the list of {str(wanted)[:40]}")
        offers = [_fuller(item, offer, wanted.get(item.digest)) for item, offer in zip(items, offers)]
    raise not_understood(remote.host, "it wants the list of files again and again")


def _fuller(item: Item, offer: dict[str, Any], wanted: Any) -> dict[str, Any]:
    """The offer with the part that the host wants: nothing (None), all "rows", "buckets", or rows of some buckets."""
    if wanted is None:
        return offer
    if wanted == "rows":
        return {**offer, "rows": pack(item.rows)}
    if not isinstance(wanted, list):
        return {**offer, "buckets": item.buckets}
    asked_for = {bucket for bucket in wanted if isinstance(bucket, int)}
    rows = [row for row in item.rows if bucket_of(row[0], len(item.buckets)) in asked_for]
    return {**offer, "buckets": item.buckets, "rows": pack(rows)}
