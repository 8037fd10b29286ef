"""The manifest of an upload: how both ends name, compare and send its files.

An *item* is {"name", "kind": "folder" | "files", "digest", "files": [row, …]}, its rows sorted by path; a *row* is
[path, size, sha256, mtime_ns, mode]. A digest says whether two manifests are the same, whatever the times in them.

The manifest of 22,500 files is 3 MB, so it is not sent before it is asked for. An *offer* is {"name", "kind",
"digest"}.
A host that does not know the digest asks for all "rows"; or, where something was published under the name before, for
"buckets", a digest of the rows of every bucket of paths, and then for the rows of the buckets that differ from what it
has: one changed frame costs one bucket.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable
from typing import Any

from surgvqa.errors import SurgvqaError

MAX_BUCKETS = 1 << 12
MAX_PACKED = 1 << 30
"""Bytes of rows that are unpacked at most."""


class Wanted(Exception):
    """This end needs more of a manifest first. {digest of the item: "rows", "buckets", or the numbers of buckets}."""

    def __init__(self, of: dict[str, Any]):
        super().__init__("rows of a manifest are missing")
        self.of = of


def digest_of(name: str, kind: str, rows: Iterable[list[Any]]) -> str:
    """Names content and permissions: the staging folder's name, so that a changed source never resumes into an old
    one."""
    content = [f"{name}\0{kind}", *(f"{path}\0{size} {sha256} {mode}" for path, size, sha256, _, mode in rows)]
    return hashlib.sha256("\0".join(content).encode("utf-8", "surrogatepass")).hexdigest()[:40]


def bucket_count(files: int) -> int:
    """A power of two near the square root, so that there are about as many buckets as rows in each."""
    count = 1
    while count * count < files and count < MAX_BUCKETS:
        count *= 2
    return count


def bucket_of(path: str, count: int) -> int:
    return zlib.crc32(path.encode("utf-8", "surrogatepass")) % count


def bucket_digests(rows: Iterable[list[Any]], count: int) -> list[str]:
    """For each bucket a digest of its rows (without times), which have to be sorted by path."""
    found: list[list[Any]] = [[] for _ in range(count)]
    for path, size, sha256, _, mode in rows:
        found[bucket_of(path, count)].append([path, size, sha256, mode])
    return [hashlib.sha256(json.dumps(bucket).encode()).hexdigest()[:16] if bucket else "" for bucket in found]


def pack(rows: list[list[Any]]) -> str:
    """Rows as text; the hashes, which nothing can compress, apart from the rest."""
    rest = zlib.compress(json.dumps([[path, size, mtime, mode] for path, size, _, mtime, mode in rows]).encode(), 1)
    hashes = bytes.fromhex("".join(row[2] for row in rows))
    return base64.b64encode(hashes + rest).decode() + f" {len(rows)}"


def unpack(text: str) -> list[list[Any]]:
    """The rows that `pack` packed. Raises ValueError for anything else."""
    body, _, count = text.rpartition(" ")
    data, rows = base64.b64decode(body, validate=True), int(count)
    hashes, engine = data[: 32 * rows].hex(), zlib.decompressobj()
    try:
        rest = json.loads(engine.decompress(data[32 * rows :], MAX_PACKED))
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(rest) != rows:
        raise ValueError(f"{len(rest)} rows instead of {rows}")
    return [[path, size, hashes[64 * i : 64 * i + 64], mtime, mode] for i, (path, size, mtime, mode) in enumerate(rest)]


def complete(offer: dict[str, Any], known: list[list[Any]], sent: list[list[Any]]) -> dict[str, Any]:
    """The item of an offer: the rows that were sent, and of `known` those of the buckets that agree with it.

    Raises Wanted while some are missing.
    """
    if "buckets" not in offer and not sent:
        raise Wanted({offer["digest"]: "buckets" if known else "rows"})
    buckets = offer.get("buckets", [""])
    count = len(buckets)
    by_path = {row[0]: row for row in known}
    here = bucket_digests(sorted(by_path.values()), count)
    agreed = {bucket for bucket in range(count) if here[bucket] == buckets[bucket]}
    rows = [row for row in by_path.values() if bucket_of(row[0], count) in agreed]
    rows = sorted({row[0]: row for row in [*rows, *sent]}.values())
    if digest_of(offer["name"], offer["kind"], rows) == offer["digest"]:
        return {"name": offer["name"], "kind": offer["kind"], "digest": offer["digest"], "files": rows}
    if sent:
        raise SurgvqaError(f"{offer['name']}: the list of its files arrived damaged; upload again")
    missing = [bucket for bucket in range(count) if bucket not in agreed]
    raise Wanted({offer["digest"]: missing or list(range(count))})
