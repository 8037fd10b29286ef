"""Sends one item to the host: begins, sends, verifies and publishes it."""

from __future__ import annotations

import os
import time
from typing import Any

from rich.filesize import decimal as human_bytes

from remote.agent.files import unchanged
from remote.ssh.connection import Remote
from remote.ssh.errors import not_understood
from remote.ssh.patience import PATIENCE_S, Patience
from remote.ssh.process import Reserve
from remote.upload.hashes import Hashes, Item
from remote.upload.link import Link
from remote.upload.offers import Once, ask_of
from remote.upload.streams import Transfer, changed
from remote.upload.verifier import Verifier
from surgvqa.errors import SurgvqaError
from surgvqa.runs.reporter import Reporter


def held(remote: Remote, item: Item, answer: dict[str, Any]) -> tuple[set[int], dict[int, list[list[int]]]]:
    """(whole files, {file: chunks}) of an item that the host already holds. Raises for a malformed answer."""
    whole, done = answer.get("whole"), answer.get("done")
    if not (isinstance(whole, list) and isinstance(done, dict)) or not all(isinstance(i, int) for i in whole):
        raise not_understood(remote.host, f"it holds {str(answer)[:80]}")
    found: dict[int, list[list[int]]] = {}
    for index, ranges in done.items():
        size = item.entries[int(index)].size if index.isdecimal() and int(index) < len(item.entries) else -1
        for one in ranges if isinstance(ranges, list) else [None]:
            match one:
                case [int(offset), int(length)] if offset >= 0 and length > 0 and offset + length <= size:
                    found.setdefault(int(index), []).append([offset, length])
                case _:
                    raise not_understood(remote.host, f"it holds {str(one)[:40]} of file {str(index)[:20]}")
    return {i for i in whole if 0 <= i < len(item.entries)}, found


def send_item(
    remote: Remote,
    item: Item,
    run: Reporter,
    hashes: Hashes,
    facts: dict[str, Any],
    reserve: Reserve,
    link: Link,
    *,
    streams: int = 0,
    patience_s: float = PATIENCE_S,
    published: bool = False,
) -> dict[str, Any]:
    """Sends, verifies and publishes one item, from where an earlier attempt stopped.

    `published`: the host has just answered that it has the item.
    """
    began = time.monotonic()
    answer = {"complete": True} if published else ask_of(remote, "begin", item)
    result: dict[str, Any] = {"name": item.name, "bytes": item.bytes, "sent_bytes": 0, "streams": 0, "resent_bytes": 0}
    if answer.get("removed"):
        run.phase("upload", f"{item.name}: removed there: {human_bytes(answer['removed'])} of an older attempt")
    if answer.get("complete"):
        run.phase("upload", f"{item.name}: already there")
        return {**result, "seconds": time.monotonic() - began}
    run.phase("upload", f"{item.name}: {human_bytes(item.bytes)} in {len(item.entries)} files")
    whole, done = held(remote, item, answer)
    rtt_s = link.round_trip(remote)
    verifier = Verifier(reserve, item)

    def progress(transfer: Transfer) -> None:
        here = item.bytes - transfer.total
        run.progress(
            "upload",
            min(item.bytes, here + transfer.received),
            item.bytes,
            "bytes",
            streams=len([s for s in transfer.streams if s.live]),
            file=item.entries[next(iter(transfer.queue.files), -1)].path,
        )

    try:
        for _ in range(3):
            transfer = Transfer(
                reserve,
                item,
                done,
                rtt_s=rtt_s,
                whole=whole,
                contents=hashes.contents,
                cores=min(os.cpu_count() or 1, facts["cpus"] or 1),
                streams=streams,
                patience_s=patience_s,
                queueing=link.queueing,
                on_progress=progress,
                on_file=verifier.tell,
            )
            transfer.run()
            result["sent_bytes"] += transfer.received
            result["resent_bytes"] += transfer.resent
            result["streams"] = transfer.wanted
            result["probed"] = transfer.history
            there = verifier.wait(patience_s)
            for entry in item.entries:
                if not unchanged(entry.source, entry.size, entry.mtime_ns):
                    raise changed(entry.source)
            wrong = sorted(transfer.wrong | {i for i in item.large if there[i] != item.entries[i].sha256})
            if not wrong:
                break
            for index in wrong:
                entry = item.entries[index]
                hashes.forget(entry.source)
                if hashes.entries([(entry.source, entry.path)])[0].sha256 != entry.sha256:
                    raise changed(entry.source)
                run.warning(f"{entry.path}: damaged on the way or on the host's disk; sent again")
                if index not in transfer.wrong:
                    verifier.reset(index)
            whole, done = set(range(len(item.entries))) - set(wrong), {}
        else:
            raise SurgvqaError(
                f"{item.entries[wrong[0]].path}: arrives damaged again and again; is the disk there well?"
            )
    finally:
        verifier.close()
    asked, once = False, Once(remote)

    def publish() -> None:
        nonlocal asked
        if asked and ask_of(once, "begin", item).get("complete"):
            return  # it was published, only the answer was lost
        asked = True
        ask_of(once, "publish", item)

    remote.patiently(publish, Patience(patience_s, run.warning))
    return {**result, "seconds": time.monotonic() - began}
