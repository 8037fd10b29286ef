"""`surgvqa-remote upload HOST`: plan, send, verify, publish; and merge there when that is cheaper."""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

from rich.filesize import decimal as human_bytes

from remote.jobs import launch, run_events
from remote.ssh.connection import Remote, connect
from remote.ssh.patience import Patience
from remote.ssh.process import Reserve, best_ciphers
from remote.upload import ahead, hub
from remote.upload.ahead import Ahead
from remote.upload.hashes import Hashes, Item
from remote.upload.host_settings import host_settings
from remote.upload.link import Link
from remote.upload.offers import ask_of
from remote.upload.options import UploadOptions
from remote.upload.plan import (
    Early,
    Way,
    checkpoint_ways,
    compare,
    data_sources,
    plan_table,
    public,
)
from remote.upload.remembered import known_offers, known_rate
from remote.upload.send import send_item
from surgvqa.config.settings import Path_, settings_of
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run
from surgvqa.runs.reporter import Reporter
from surgvqa.terminal.figures import human_seconds
from surgvqa.untrusted import one_line

SMALL_STREAMS = 2
"""Streams of an upload over a short link; a large file needs one agent more, which verifies it."""
WATCHED_BYTES = 64_000_000
"""A smaller upload is over before more streams are tried, so its link need not be watched."""


def fill_in(options: UploadOptions, workspace: Workspace) -> None:
    """Fills in options that were not given, from surgvqa.toml (any command's table)."""
    tables = (None, "train", "merge", "evaluate")
    for name, setting in settings_of(UploadOptions).items():
        if setting.type is Path_ and getattr(options, name) is None:
            values = (workspace.value(name, table) for table in tables)
            setattr(options, name, next((v for v in values if v is not None), None))
    options.stage1_hub_id = options.stage1_hub_id or workspace.value("stage1_hub_id", "host")


def check(options: UploadOptions, workspace: Workspace) -> None:
    """Checks everything that can be checked before the host is asked."""
    fill_in(options, workspace)
    checkpoints = options.model_name_or_path, options.stage1_model_path, options.stage1_hub_id
    if not any((options.train_data_path, options.eval_data_path, *checkpoints)):
        raise UsageError("nothing to upload: name --model_name_or_path, --train_data_path, … or make a surgvqa.toml")
    wanted = {
        "merged": ["model_name_or_path"],
        "adapter": ["stage1_model_path", "stage2_adapter_path"],
        "hub": ["stage1_hub_id", "stage2_adapter_path"],
    }
    for name in wanted.get(options.what, []):
        if not getattr(options, name):
            raise UsageError(f"--what {options.what} needs --{name}")
    if options.stage1_hub_id:
        hub.check_id(options.stage1_hub_id)


def upload(options: UploadOptions, run: Run, workspace: Workspace, host: str, accept_new_host_key: bool) -> Outcome:
    """Runs the whole upload. Events go to `run`."""
    began = time.monotonic()
    settings = host_settings(workspace)
    run.phase("connect", host)
    first = ahead.to(host, workspace.root, not options.checksum)
    target = first.host
    reserve, link = Reserve(target, best_ciphers(target, True)), Link(target)  # most hosts have AES hardware
    patience = Patience(options.patience_s, run.warning)
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool, closing(patience), closing(first), closing(link):
        stack.callback(lambda: reserve.close())
        ready = 0 if options.dry_run or first.offers else SMALL_STREAMS  # after an upload there may be nothing to send
        reached = pool.submit(_reach, first, workspace, accept_new_host_key, patience, stack, reserve, ready)
        hashes = Hashes(checksum=options.checksum, before_reading=lambda: reached.done() and reached.result())
        gc.disable()  # tens of thousands of objects that stay: to look for cycles among them takes as long as the rest,
        try:
            ways = checkpoint_ways(options, workspace, hashes, run)
            sources = data_sources(options, workspace)
            data = [Item("data", "files", hashes.entries(sources))] if sources else []
            items = [item for way in ways for item in way.items] + data
            refuse_overlaps(items)
            digests = [item.digest for item in items]
        finally:
            gc.freeze()  # and as long again when the process ends
            gc.enable()
        offers = [item.offer for item in items]
        if not options.dry_run and first.offers != offers:
            reserve.fill(SMALL_STREAMS + any(item.large for item in items))  # they connect while the plan is made
            if sum(item.bytes for item in items) > WATCHED_BYTES:
                link.watch()
        remote, facts, early = reached.result()
        if not facts["aes"]:
            reserve.close()
            reserve = Reserve(target, best_ciphers(target, False))
        plan = compare(remote, ways, data, options.checksum, early)
        show = plan_table(host, plan)
        run.emit("plan", **{k: plan[k] for k in ("ways", "data", "chosen", "bytes_per_s", "free_bytes")})
        if options.dry_run:
            return Outcome(public(plan), show=show)
        chosen: Way | None = plan["way"]
        if chosen and chosen.hub_id:
            hub.get(remote, chosen.hub_id, run, options.patience_s)
        sent = [
            send_item(
                remote,
                item,
                run,
                hashes,
                facts,
                reserve,
                link,
                streams=options.streams,
                patience_s=options.patience_s,
                published=item.digest in plan["published"],
            )
            for item in [*(chosen.items if chosen else []), *data]
        ]
        deleted = retire(remote, data, plan["data"], options.delete, run)
        if plan["stagings"]:
            name_abandoned(remote, digests, run)
        remote.ask("settings", text=settings)
        merged_there = None
        if chosen and chosen.output:
            merged_there = merge_there(remote, chosen, run)
        known_offers(target.name, offers)
    total, seconds = sum(s["sent_bytes"] for s in sent), sum(s["seconds"] for s in sent)
    if total > 64e6:
        known_rate(host, total / seconds)
    data_out = {
        **public(plan),
        "items": sent,
        "sent_bytes": total,
        "seconds": time.monotonic() - began,
        "deleted": deleted,
        "merged_on_host": merged_there,
    }

    def tell(console: Any) -> None:
        rate = f", {human_bytes(int(total / max(seconds, 1e-9)))}/s" if total else ""
        console.print(f"{host}: {human_bytes(total)} sent in {human_seconds(seconds)}{rate}; all files verified")
        if merged_there and merged_there.get("already_there"):
            console.print(f"{merged_there['output']}: merged there before from the same folders")

    return Outcome(data_out, show=tell)


def _reach(
    first: Ahead,
    workspace: Workspace,
    accept_new_host_key: bool,
    patience: Patience,
    stack: ExitStack,
    reserve: Reserve,
    ready: int,
) -> tuple[Remote, dict[str, Any], Early | None]:
    """The connection, which `stack` closes, what the host is, and what it says of the items of the last upload.

    `ready`: as many streams are started as soon as the host has answered.
    """
    target = first.host
    if answered := first.answers():
        agent, answers, found = answered
        remote, facts = Remote(target, patience), found["probe"]
        remote.use(agent, answers)
    else:
        remote = connect(target, workspace.root, accept_new_host_key, patience)
    stack.callback(remote.close)
    if not answered:
        facts = remote.ask("probe", venv=target.entry.venv)
    if not facts["writable"]:
        raise SurgvqaError(f"{target.name}: cannot write in {facts['workspace']}; set workspace in hosts.toml")
    reserve.fill(ready)
    return remote, facts, Early(first.offers, found["known"]) if answered and first.offers else None


def name_abandoned(remote: Remote, digests: list[str], run: Reporter) -> None:
    """Warns of interrupted uploads of other names, which no upload will continue by itself.

    Those of this upload's names are removed when it begins.
    """
    for one in remote.ask("abandoned", digests=digests)["uploads"][:NAMED]:
        run.warning(
            one_line(
                f"{one['name'][:100]}: {human_bytes(one['bytes'])} of an interrupted {one['note'][:100]}; "
                f"surgvqa-remote disk {remote.host.name} --clean staging removes it"
            )
        )


def refuse_overlaps(items: list[Item]) -> None:
    """Raises UsageError if an item would lie inside another on the host, because folders are replaced as a whole."""
    for folder in [item for item in items if item.kind == "folder"]:
        for other in items:
            if (other.name, other.kind) == (folder.name, folder.kind):
                continue
            paths = [other.name] if other.kind == "folder" else [entry.path for entry in other.entries]
            inside = next((path for path in paths if (path + "/").startswith(folder.name + "/")), None)
            if inside:
                raise UsageError(f"{inside} would lie in {folder.name} on the host, which is replaced as a whole")


NAMED = 5
"""Files that a message names."""


def retire(remote: Remote, data: list[Item], there: dict[str, Any], delete: bool, run: Reporter) -> list[str]:
    """Removes data files on the host that are no longer part of this upload. Returns what was removed.

    Warns of those that stay. Without `delete`, it removes only files that were replaced by one with another extension,
    because the host would find both.
    """
    names: list[str] = []
    if there["stale_files"] and (delete or there["replaced"]):
        for item in data:
            answer = ask_of(remote, "retire", item, everything=delete)
            names += answer["removed"]
            if answer["changed"]:
                run.warning(f"changed there since, so not removed: {_some(answer['changed'], len(answer['changed']))}")
    left = [path for path in there["stale"] if path not in names]
    if left and not delete:
        count = there["stale_files"] - len(names)
        run.warning(f"sent once and no longer part of this upload: {_some(left, count)}; --delete removes them there")
    return names


def _some(paths: list[str], count: int) -> str:
    more = f" and {count - NAMED} more" if count > NAMED else ""
    return one_line(", ".join(paths[:NAMED]) + more)


def merge_there(remote: Remote, way: Way, run: Reporter) -> dict[str, Any]:
    """Merges on the host, unless it has merged the same inputs before. The merge's events go to `run`."""
    names, host = way.merge(), remote.host.name
    if remote.ask("merged", **names)["same"]:
        run.phase("merge", f"{way.output}: merged on {host} before, from the same {way.stage1} and {names['adapter']}")
        return {"state": "finished", "already_there": True, "output": way.output}
    argv = ["--stage1_model_path", names["stage1"], "--stage2_adapter_path", names["adapter"]]
    run.phase("merge", f"on {host}")
    needs = [names["stage1"], names["adapter"]]
    launched = launch.launch(remote, "merge", [*argv, "--output_path", way.output], needs=needs, exclusive=False)
    answer = run_events.wait(remote, launched["run"], run)
    remote.ask("note_merge", **names)
    return answer
