"""`surgvqa-remote upload HOST`: plan, send, verify, publish; and merge there when that is cheaper."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.filesize import decimal as human_bytes
from rich.table import Table

from remote.jobs import launch
from remote.ssh.connection import Remote, Unreachable, connect
from remote.ssh.hosts import resolve
from remote.ssh.process import Reserve, best_ciphers
from remote.upload import hub
from remote.upload.options import UploadOptions
from remote.upload.plan import Hashes, Item, Way, cheapest, data_sources, folder_sources, remote_name
from remote.upload.streams import Transfer, Verifier, changed
from surgvqa.config.options import COMMAND_OPTIONS, NONE, Path_, Workspace, settings_of
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run
from surgvqa.terminal.job_view import human_seconds

RATES = Path("~/.cache/surgvqa/rates.json")
AHEAD = 3  # connections that every upload needs: two streams, and one for the hashes
WAYS = {
    "merged": "merged checkpoint",
    "adapter": "Stage 1 + adapter, merged there",
    "hub": "Stage 1 from the hub + adapter, merged there",
}


def fill_in(options: UploadOptions, workspace: Workspace) -> None:
    """What was not named comes from surgvqa.toml (any command's table)."""
    tables = (None, "train", "merge", "evaluate")
    for name, setting in settings_of(UploadOptions).items():
        if setting.type is Path_ and getattr(options, name) is None:
            values = (workspace.value(name, table) for table in tables)
            setattr(options, name, next((v for v in values if v is not None), None))
    options.stage1_hub_id = options.stage1_hub_id or workspace.value("stage1_hub_id", "host")


def check(options: UploadOptions, workspace: Workspace) -> None:
    """Everything that can be seen from here, before the host is asked."""
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


def checkpoint_ways(options: UploadOptions, workspace: Workspace, hashes: Hashes, run: Run) -> list[Way]:
    """The ways to the checkpoint that are open from here; send_bytes still counts everything."""
    ways = []

    def item(path: str) -> Item:
        sources = folder_sources(Path(path))
        run.phase("hash", f"{path}")
        entries = hashes.entries(sources, lambda done, total: run.progress("hash", done, total, "bytes"))
        return Item(remote_name(path, workspace), "folder", entries)

    merged, stage1, stage2 = options.model_name_or_path, options.stage1_model_path, options.stage2_adapter_path
    if options.what in ("auto", "merged") and merged and Path(merged).is_dir():
        ways.append(Way("merged", [item(merged)], 0))
    if options.what in ("auto", "adapter", "hub") and stage2 and Path(stage2).is_dir():
        output = remote_name(options.output_path or merged or "merged", workspace)
        first = [item(stage1)] if stage1 and Path(stage1).is_dir() else []
        both, merge_bytes = [*first, item(stage2)], sum(i.bytes for i in first)
        if first and options.what != "hub":
            ways.append(Way("adapter", both, 0, merge_bytes, first[0].name, output=output))
        if options.stage1_hub_id and options.what != "adapter":
            folder = first[0].name if first else hub.folder_of(options.stage1_hub_id)
            ways.append(Way("hub", both, 0, merge_bytes, folder, options.stage1_hub_id, output))
    if options.what != "data" and not ways:
        named = [p for p in (merged, stage1, stage2) if p]
        if named:
            raise UsageError(f"{named[0]}: no such folder; merge first (surgvqa merge), or name the Stage-1 folder")
    return ways


def known_rate(host: str, rate: float | None = None) -> float | None:
    """The rate of the last upload to `host` in bytes/s; given one, remembers it."""
    file = RATES.expanduser()
    try:
        rates = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        rates = {}
    if rate is not None:
        rates[host] = rate
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rates), encoding="utf-8")
        except OSError:
            return rate
    return rates.get(host)


def upload(options: UploadOptions, run: Run, workspace: Workspace, host: str, accept_new_host_key: bool) -> Outcome:
    """The whole job; events go to `run`."""
    began = time.monotonic()
    settings = host_settings(workspace)
    run.phase("connect", host)
    target = resolve(host, workspace.root)
    # Most hosts have AES hardware: the streams' connections are made while ours is, and while the plan is made.
    reserve = Reserve(target, best_ciphers(target, True), 0 if options.dry_run else AHEAD)
    remote = None
    try:
        remote = connect(target, workspace.root, accept_new_host_key)
        facts = remote.ask("probe", venv=remote.host.entry.venv)
        if not facts["writable"]:
            raise SurgvqaError(f"{host}: cannot write in {facts['workspace']}; set workspace in hosts.toml")
        if not facts["aes"]:
            reserve.close()
            reserve = Reserve(target, best_ciphers(target, False))
        hashes = Hashes()
        ways = checkpoint_ways(options, workspace, hashes, run)
        sources = data_sources(options, workspace)
        data = [Item("data", "files", hashes.entries(sources))] if sources else []
        plan = compare(remote, ways, data)
        show = plan_table(host, plan)
        run.emit("plan", **{k: plan[k] for k in ("ways", "data", "chosen", "bytes_per_s", "free_bytes")})
        if options.dry_run:
            return Outcome(public(plan), show=show)
        chosen: Way | None = plan["way"]
        if chosen and chosen.hub_id:
            hub.get(remote, chosen.hub_id, run, options.patience_s)
        sent = [
            send_item(remote, item, run, hashes, facts, reserve, streams=options.streams, patience_s=options.patience_s)
            for item in [*(chosen.items if chosen else []), *data]
        ]
        remote.ask("settings", text=settings)
        merged_there = None
        if chosen and chosen.output:
            merged_there = merge_there(remote, chosen, run)
    finally:
        reserve.close()
        if remote:
            remote.close()
    total, seconds = sum(s["sent_bytes"] for s in sent), sum(s["seconds"] for s in sent)
    if total > 64e6:
        known_rate(host, total / seconds)
    data_out = {
        **public(plan),
        "items": sent,
        "sent_bytes": total,
        "seconds": time.monotonic() - began,
        "merged_on_host": merged_there,
    }

    def tell(console: Any) -> None:
        rate = f", {human_bytes(int(total / max(seconds, 1e-9)))}/s" if total else ""
        console.print(f"{host}: {human_bytes(total)} sent in {human_seconds(seconds)}{rate}; all files verified")
        if merged_there and merged_there.get("already_there"):
            console.print(f"{merged_there['output']}: merged there before from the same folders")

    return Outcome(data_out, show=tell)


def compare(remote: Remote, ways: list[Way], data: list[Item]) -> dict[str, Any]:
    """Asks the host what it has, and finds the way that is over first."""
    items = [item for way in ways for item in way.items] + data
    answer = remote.ask("known", items=[item.wire() for item in items])
    stands = dict(zip((id(i) for i in items), answer["items"]))
    foreign = [name for item in items for name in stands[id(item)]["foreign"] if stands[id(item)]["state"] == "foreign"]
    open_ways = [way for way in ways if all(stands[id(item)]["state"] != "foreign" for item in way.items)]
    if foreign and (len(open_ways) < min(1, len(ways)) or any(stands[id(i)]["state"] == "foreign" for i in data)):
        raise SurgvqaError(
            f"{remote.host.name}: {', '.join(foreign[:3])} exists in the workspace there and was not made by upload; "
            "move it away or give yours another name"
        )
    ways = open_ways

    def missing(item: Item) -> int:
        state = stands[id(item)]
        have = set(state["have"])
        return 0 if state["state"] == "complete" else sum(e.size for i, e in enumerate(item.entries) if i not in have)

    for way in ways:
        way.send_bytes = sum(missing(item) for item in way.items)
        if way.output and not way.send_bytes and remote.ask("merged", **way.merge())["same"]:
            way.merge_bytes = 0
    hub_problem = ""
    for way in [way for way in ways if way.hub_id]:
        hub_problem = settle_hub(remote, way, missing)
        if hub_problem:
            ways.remove(way)
    if hub_problem and not ways:
        raise SurgvqaError(f"{remote.host.name}: {hub_problem}")
    rate = known_rate(remote.host.name) or 30e6
    way = cheapest(ways, rate) if ways else None
    return {
        "way": way,
        "chosen": way.name if way else None,
        "hub_problem": hub_problem,
        "bytes_per_s": rate,
        "free_bytes": answer["free"],
        "data": {"files": sum(len(i.entries) for i in data), "send_bytes": sum(missing(i) for i in data)},
        "ways": [
            {
                "name": w.name,
                "items": [i.name for i in w.items],
                "total_bytes": sum(i.bytes for i in w.items),
                "send_bytes": w.send_bytes,
                "merge_bytes": w.merge_bytes,
                "download_bytes": w.download_bytes,
                "seconds": w.seconds(rate),
            }
            for w in ways
        ],
    }


def settle_hub(remote: Remote, way: Way, missing: Callable[[Item], int]) -> str:
    """Fills in what the host would get from the hub and what is left to send; why it cannot, or ''.

    With Stage 1 here as well, the hub's weights must have its hashes: the same model by either way.
    """
    stage1 = way.items[0] if len(way.items) > 1 else None
    if stage1 and not missing(stage1):
        way.hub_id = ""  # it is there
        return ""
    found = hub.look(remote, way.hub_id)
    if "problem" in found:
        return str(found["problem"])
    if stage1:
        wrong = hub.differing(stage1, found)
        if wrong:
            folder = stage1.entries[0].source.parent
            return f"{way.hub_id}: {wrong[0]} is another there than in {folder}; name its revision: USER/NAME@REVISION"
        own = sum(entry.size for entry in stage1.entries if entry.path not in found["files"])
        way.send_bytes = missing(way.items[1]) + own
    else:
        way.merge_bytes = sum(size for path, (size, _) in found["files"].items() if path.endswith(".safetensors"))
    way.download_bytes = found["download_bytes"]
    return ""


def public(plan: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in plan.items() if k != "way"}


def plan_table(host: str, plan: dict[str, Any]) -> Any:
    """Draws the plan."""

    def show(console: Any) -> None:
        table = Table("what", "to send", "of", "about", "", title=f"upload to {host}")
        for way in plan["ways"]:
            mark = "chosen" if way["name"] == plan["chosen"] else ""
            sizes = human_bytes(way["send_bytes"]), human_bytes(way["total_bytes"])
            table.add_row(WAYS[way["name"]], *sizes, human_seconds(way["seconds"]), mark)
        data = plan["data"]
        if data["files"]:
            seconds = human_seconds(data["send_bytes"] / plan["bytes_per_s"])
            table.add_row(f"data ({data['files']} files)", human_bytes(data["send_bytes"]), "", seconds, "")
        console.print(table)
        for way in plan["ways"]:
            if way["download_bytes"]:
                console.print(f"the host itself downloads {human_bytes(way['download_bytes'])} from the hub")
        if plan["hub_problem"]:
            console.print(f"not from the hub: {plan['hub_problem']}", markup=False)
        console.print(
            f"free there: {human_bytes(plan['free_bytes'])}; times at {human_bytes(int(plan['bytes_per_s']))}/s"
        )

    return show


def send_item(
    remote: Remote,
    item: Item,
    run: Run,
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
    result = {"name": item.name, "bytes": item.bytes, "sent_bytes": 0, "streams": 0, "resent_bytes": 0}
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


def host_settings(workspace: Workspace) -> str:
    """The workspace's surgvqa.toml as the host needs it: the same values, with the paths that they have there."""
    lines = ["# Written by surgvqa-remote upload, from the workspace it was called in."]

    def value(key: str, raw: Any, known: dict[str, Any]) -> str:
        setting = known.get(key)
        if raw is None:
            raw = NONE[0]
        elif setting is not None and setting.type is Path_:
            names = [remote_name(path, workspace, made_there=True) for path in (raw if setting.repeated else [raw])]
            raw = names if setting.repeated else names[0]
        text = json.dumps(raw, ensure_ascii=False).replace("\x7f", "\\u007f")  # which TOML wants escaped
        return f"{key} = {text}"

    everything = {n: s for options in COMMAND_OPTIONS.values() for n, s in settings_of(options).items()}
    lines += [value(key, raw, everything) for key, raw in workspace.values.items() if key != "host"]
    for table, values in workspace.by_command.items():
        if table in ("host", "demo"):
            continue
        lines += ["", f"[{table}]"]
        lines += [value(k, v, settings_of(COMMAND_OPTIONS[table])) for k, v in values.items()]
    return "\n".join(lines) + "\n"


def merge_there(remote: Remote, way: Way, run: Run) -> dict[str, Any]:
    """Has the host merge, unless it did so before with the same inputs; the merge's events pass through `run`."""
    names, host = way.merge(), remote.host.name
    if remote.ask("merged", **names)["same"]:
        run.phase("merge", f"{way.output}: merged on {host} before, from the same {way.stage1} and {names['adapter']}")
        return {"state": "finished", "already_there": True, "output": way.output}
    argv = ["--stage1_model_path", names["stage1"], "--stage2_adapter_path", names["adapter"]]
    run.phase("merge", f"on {host}")
    needs = [names["stage1"], names["adapter"]]
    launched = launch.launch(remote, "merge", [*argv, "--output_path", way.output], needs=needs, exclusive=False)
    answer = launch.wait(remote, launched["run"], run)
    remote.ask("note_merge", **names)
    return answer
