"""One item onto the host: begun, sent, verified, published."""

from __future__ import annotations

import os
import time
from typing import Any

from rich.filesize import decimal as human_bytes

from remote.ssh.connection import Remote
from remote.ssh.errors import Unreachable
from remote.ssh.process import Reserve
from remote.upload.hashes import Hashes, Item
from remote.upload.streams import Transfer, changed
from remote.upload.verifier import Verifier
from surgvqa.errors import SurgvqaError
from surgvqa.runs.reporter import Reporter


def send_item(
    remote: Remote,
    item: Item,
    run: Reporter,
    hashes: Hashes,
    facts: dict[str, Any],
    reserve: Reserve,
    *,
    streams: int = 0,
    patience_s: float = 300.0,
) -> dict[str, Any]:
    """Sends, verifies and publishes one item; goes on where an earlier attempt stopped."""
    began = time.monotonic()
    answer = remote.ask("begin", item=item.wire())
    result: dict[str, Any] = {"name": item.name, "bytes": item.bytes, "sent_bytes": 0, "streams": 0, "resent_bytes": 0}
    if answer["complete"]:
        run.phase("upload", f"{item.name}: already there")
        return {**result, "seconds": time.monotonic() - began}
    run.phase("upload", f"{item.name}: {human_bytes(item.bytes)} in {len(item.entries)} files")
    done = {int(index): ranges for index, ranges in answer["done"].items()}
    rtt_s = remote.round_trip()
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
                cores=min(os.cpu_count() or 1, facts["cpus"] or 1),
                streams=streams,
                patience_s=patience_s,
                queueing=remote.queueing,
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
                try:
                    stat = os.stat(entry.source)
                except OSError:
                    raise changed(entry.source) from None
                if (stat.st_size, stat.st_mtime_ns) != (entry.size, entry.mtime_ns):
                    raise changed(entry.source)
            wrong = [i for i, entry in enumerate(item.entries) if there[i] != entry.sha256]
            if not wrong:
                break
            for index in wrong:
                entry = item.entries[index]
                hashes.forget(entry.source)
                if hashes.entries([(entry.source, entry.path)])[0].sha256 != entry.sha256:
                    raise changed(entry.source)
                run.warning(f"{entry.path}: damaged on the way or on the host's disk; sent again")
                verifier.reset(index)
            done = {i: [[0, e.size]] for i, e in enumerate(item.entries) if i not in wrong and e.size}
        else:
            raise SurgvqaError(
                f"{item.entries[wrong[0]].path}: arrives damaged again and again; is the disk there well?"
            )
    finally:
        verifier.close()
    for attempt in range(5):
        try:
            remote.ask("publish", item=item.wire())
            break
        except Unreachable:
            if attempt == 4:
                raise
            time.sleep(2**attempt)
            if remote.ask("begin", item=item.wire())["complete"]:  # it was published, only the answer was lost
                break
    return {**result, "seconds": time.monotonic() - began}
