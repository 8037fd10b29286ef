"""Contents drawn from what jobs write: plans, progress, reports. Pure functions; missing fields are left out."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from textual.content import Content

from surgvqa.terminal.figures import amount, counted
from tui import words
from tui.follow.follower import Follower
from tui.follow.run_model import Progress

MUTED = "$muted"
SHARDS_SHOWN = 8


def lines(*parts: Content | str | None) -> Content:
    """Contents below each other; None is left out."""
    return Content("\n").join(Content(p) if isinstance(p, str) else p for p in parts if p is not None)


def problem(text: str) -> Content:
    """An error, in place."""
    return Content.assemble(("✗ ", "$error"), (text or "it failed and did not say why", "$error"))


def waiting(text: str) -> Content:
    """Something that is being found out, or waits for the user."""
    return Content.assemble((text, MUTED))


def warnings(texts: list[Any]) -> list[Content]:
    """One line a warning."""
    return [Content.assemble(("! ", "bold $warning"), (_text(w), "$warning")) for w in texts]


def facts(pairs: list[tuple[str, Any]], width: int = 18) -> list[Content]:
    """`name   value` lines; None is left out."""
    return [
        Content.assemble((f"{name:<{width}}", MUTED), value if isinstance(value, Content) else str(value))
        for name, value in pairs
        if value is not None
    ]


def _text(entry: Any) -> str:
    return str(entry.get("text") or entry) if isinstance(entry, dict) else str(entry)


# --- jobs ------------------------------------------------------------------------------------------------------------


def progress_line(progress: Progress, width: int, label: int = 16) -> Content:
    """One phase: bar, share, amount, rate, time left; on a narrow screen first the rate goes, then the total."""
    done = amount(progress.done, progress.unit)
    total = f" of {amount(progress.total, progress.unit)}" if progress.total else ""
    unit = "" if progress.unit == "bytes" else f" {progress.unit}"
    fraction = progress.fraction
    rate = left = ""
    if progress.rate and (fraction is None or fraction < 1):
        rate = f"  {words.rate(progress.rate, progress.unit)}"
        left = f"  {words.seconds(progress.left_s)} left" if progress.left_s is not None else ""
    bar = max(8, min(40, width - label - 58))
    room = width - label - bar - 9
    texts = [f"{done}{total}{unit}{rate}{left}", f"{done}{total}{unit}{left or rate}", f"{done}{unit}{left or rate}"]
    text = next((t for t in texts if len(t) <= room), texts[-1])
    share = f"{100 * fraction:4.0f} % " if fraction is not None else "       "
    style = "$success" if fraction == 1 else "$primary"
    name = words.clip(progress.phase, label)
    return Content.assemble(f"{name:<{label}} ", words.bar(bar, fraction or 0.0, style), f" {share} ", (text, MUTED))


def job_progress(follower: Follower, width: int) -> Content:
    """A running job that has no chart: its phases with their progress, and warnings."""
    model = follower.model
    head = Content.assemble(
        words.state(follower.state),
        "  ",
        (model.phase, "bold"),
        (f"  {model.phase_text}" if model.phase_text else "", MUTED),
    )
    begun = [replace(shard, phase=shard_name(shard.phase)) for shard in list(model.shards.values())[-SHARDS_SHOWN:]]
    label = max((len(p.phase) for p in [*begun, *model.progress.values()]), default=8)
    rows = [progress_line(p, width, label) for p in model.progress.values()]
    shards = [progress_line(shard, width, label) for shard in begun]
    return lines(*warnings(model.warnings), head, "", *rows, *([""] if shards else []), *shards)


def shard_name(file: str) -> str:
    """model-00002-of-00005.safetensors as `shard 2 of 5`: room for the bar."""
    match = re.fullmatch(r"model-0*(\d+)-of-0*(\d+)\.safetensors", file)
    return f"shard {match[1]} of {match[2]}" if match else file


def job_end(follower: Follower) -> Content:
    """How a job ended, why when it went wrong, and what to do about it."""
    model = follower.model
    parts: list[Content | str] = [
        Content.assemble(words.state(follower.state), (f"  after {words.seconds(model.elapsed_s)}", MUTED))
    ]
    parts += [problem(text) for text in model.errors[-3:]]
    if follower.state in ("died", "failed") and not model.errors:
        said = [line for line in follower.log if line.strip()]
        parts += [Content.assemble(("last line  ", MUTED), line) for line in said[-3:]]
    parts += warnings(model.warnings)
    if follower.state == "died":
        parts.append(
            Content.assemble(("The process ended without a message: killed, or the machine went down.", "$warning"))
        )
    parts += facts([(k, v) for k, v in model.result.items() if isinstance(v, (int, float, str, bool)) and k != "state"])
    return lines(*parts)


# --- merge -----------------------------------------------------------------------------------------------------------


def merge_plan(data: dict[str, Any], width: int) -> Content:
    """What the dry run found: warnings first, then sizes, disk, tensors and shards."""
    needed, free = data.get("output_bytes"), data.get("free_bytes")
    disk = None
    if needed is not None and free is not None:
        enough = (
            ("enough", "$success") if needed <= free else (f"{words.size(needed - free)} too little", "bold $error")
        )
        disk = Content.assemble(f"{words.size(needed)} to write, {words.size(free)} free: ", enough)
    tensors = [
        f"{data[key]:,} {label}"
        for key, label in (
            ("modules_merged", "modules merged"),
            ("tensors_replaced", "replaced"),
            ("tensors_cast", "cast"),
            ("tensors_copied", "copied untouched"),
        )
        if data.get(key)
    ]
    inputs = None
    if "base_bytes" in data and "adapter_bytes" in data:
        inputs = f"checkpoint {words.size(data['base_bytes'])}, adapter {words.size(data['adapter_bytes'])}"
    return lines(
        *warnings(data.get("warnings") or []),
        *facts([("reads", inputs), ("writes", data.get("output")), ("disk", disk), ("device", data.get("device"))]),
        *facts([("tensors", ", ".join(tensors) or None)]),
        *shard_rows(data.get("shards") or [], width),
        "",
        key_hints(("m", "starts the merge")),
    )


def key_hints(*keys: tuple[str, str]) -> Content:
    """What to do next, by key."""
    hints = [Content.assemble((key, "bold $footer-key-foreground"), (f" {text}", MUTED)) for key, text in keys]
    return Content("   ").join(hints)


def shard_rows(shards: list[dict[str, Any]], width: int) -> list[Content]:
    """The planned shards, the first few of many."""
    room = max(12, min(36, width - 43))  # what the sizes and counts beside it leave
    rows = [
        Content.assemble(
            (f"{'shards' if i == 0 else '':<18}", MUTED),
            f"{words.clip(str(shard.get('file')), room):<{room}} ",
            (f"{words.size(shard.get('bytes') or 0):>9}  {counted(shard.get('tensors', 0), 'tensor')}", MUTED),
        )
        for i, shard in enumerate(shards[:SHARDS_SHOWN])
    ]
    if len(shards) > SHARDS_SHOWN:
        rows.append(Content.assemble((f"{'':<18}and {len(shards) - SHARDS_SHOWN} more", MUTED)))
    return rows


def merge_report(data: dict[str, Any], width: int) -> Content:
    """merge_report.json: warnings first, figures, and a bar a layer of ‖ΔW‖/‖W‖."""
    phases = data.get("seconds_by_phase") or {}
    total = sum(phases.values()) if phases else None
    shards = [s.get("bytes") or 0 for s in (data.get("shards") or {}).values()]
    dtypes = ", ".join(f"{n:,} {dtype}" for dtype, n in (data.get("dtypes_after") or {}).items())
    stage2 = data.get("stage2") or {}
    how = ", ".join(
        f"{k} {stage2[k]}" for k in ("r", "lora_alpha", "peft_version", "epoch", "quantised_base") if k in stage2
    )
    lost = data.get("rounding_loss")
    counts = [(data.get("modules_merged"), "modules merged"), (data.get("tensors_replaced"), "replaced")]
    counts += [(data.get("tensors_copied"), "copied untouched")]
    pairs = [
        ("tensors", ", ".join(f"{n:,} {what}" for n, what in counts if n)),
        ("dtypes", dtypes or None),
        ("written", f"{words.size(sum(shards))} in {len(shards)} shard{'s' * (len(shards) != 1)}" if shards else None),
        ("took", words.seconds(total) if total is not None else None),
        ("modules took", module_seconds(data.get("by_kind") or [])),
        ("peak memory", words.size(data["peak_rss_bytes"]) if data.get("peak_rss_bytes") else None),
        ("lost to rounding", f"{lost:.2%} of the change (median of the modules)" if lost is not None else None),
        ("Stage 2", how or None),
    ]
    head = lines(
        Content.assemble(("✓ merged", "bold $success"), (f"  {data.get('output', '')}", MUTED)),
        key_hints(("a", "audits it"), ("2", "goes on to Upload"), ("3", "to Train")),
    )
    bars = layer_bars(deltas(data.get("by_layer"), "layer"), "layer", width)
    kinds = layer_bars(deltas(data.get("by_kind"), "kind"), "kind", width)
    return lines(
        head, *warnings(data.get("warnings") or []), *facts(pairs), "", *bars, *([""] if kinds else []), *kinds
    )


def module_seconds(kinds: list[dict[str, Any]]) -> str | None:
    """What threads spent on the modules together, and the kind that took most of it."""
    known = [row for row in kinds if row.get("seconds")]
    if not known:
        return None
    most = max(known, key=lambda row: row["seconds"])
    total = words.seconds(sum(row["seconds"] for row in known))
    return f"{total} of all threads; {most['kind']} the most, {words.seconds(most['seconds'])} for {most['modules']}"


def deltas(rows: list[dict[str, Any]] | None, key: str) -> list[tuple[str, float]]:
    """(layer or kind, ‖ΔW‖/‖W‖) in the report's order."""
    found = [("other" if row.get(key) is None else str(row[key]), row.get("delta_ratio")) for row in rows or []]
    return [(name, float(value)) for name, value in found if isinstance(value, (int, float))]


def layer_bars(rows: list[tuple[str, float]], what: str, width: int) -> list[Content]:
    """A bar a layer or kind, in two columns when there is room."""
    if not rows:
        return []
    most = max(v for _, v in rows) or 1.0
    label = max(len(n) for n, _ in rows)
    columns = 2 if width >= 2 * (label + 30) and len(rows) > 8 else 1
    bar = max(6, min(40, width // columns - label - 14))
    cells = [
        Content.assemble((f"{name:>{label}} ", MUTED), words.bar(bar, value / most, "$primary"), f" {value:8.2e}  ")
        for name, value in rows
    ]
    height = -(-len(cells) // columns)
    heading = Content.assemble((f"how far each {what} moved", "bold"), ("   ‖ΔW‖ / ‖W‖", MUTED))
    return [heading, *(Content("").join(cells[row::height]) for row in range(height))]


def audit(data: dict[str, Any]) -> Content:
    """What the audit of a checkpoint said."""
    good = data.get("ok")
    verdict = ("✓ sound", "bold $success") if good else ("✗ not sound", "bold $error")
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in (data.get("dtypes") or {}).items())
    offenders = [
        Content.assemble(
            ("✗ ", "$error"), f"{o.get('name')}  {o.get('dtype')}  {o.get('shape')}", (f"  {o.get('shard')}", MUTED)
        )
        for o in (data.get("offenders") or [])[:50]
    ]
    return lines(
        Content.assemble(verdict, (f"  {data.get('tensors', 0):,} tensors: {dtypes}", MUTED)),
        *(problem(_text(p)) for p in (data.get("problems") or [])[:50]),
        *offenders,
        *([key_hints(("2", "goes on to Upload"), ("3", "to Train"))] if good else []),
    )


# --- upload and setup ------------------------------------------------------------------------------------------------

WAYS = {
    "merged": "the merged checkpoint",
    "adapter": "Stage 1 + adapter, merged there",
    "hub": "adapter, with the hub's Stage 1",
    "data": "only the data",
}


def upload_plan(plan: dict[str, Any], marked: str, width: int) -> Content:
    """The ways to have everything on the host: what each would send, what is there, how long; then the data."""
    rate, data = plan["bytes_per_s"], plan["data"]
    name = max(18, min(36, width - 48))
    head = f"  {'what':<{name}}{'to send':>10}{'there already':>15}  about"
    rows: list[Content] = [Content.assemble((words.clip(head, width), MUTED))]
    chosen = plan["chosen"]
    for way in plan["ways"]:
        there = max(0, way["total_bytes"] - way["send_bytes"] - way["download_bytes"])
        rows.append(
            _way_row(
                WAYS[way["name"]],
                way["send_bytes"],
                there,
                way["seconds"],
                name,
                marked == way["name"],
                chosen == way["name"],
            )
        )
    if not plan["ways"]:
        rows.append(_way_row(WAYS["data"], 0, None, 0.0, name, marked == "data", False))
    elif marked == "data":
        rows.append(_way_row("no checkpoint", 0, None, 0.0, name, True, False))
    if data["files"]:
        label = f"+ data, {data['files']:,} files"
        rows.append(_way_row(label, data["send_bytes"], None, data["send_bytes"] / rate, name, False, False))
    way = next((w for w in plan["ways"] if w["name"] == marked), {"send_bytes": 0, "seconds": 0.0})
    sent, seconds = way["send_bytes"] + data["send_bytes"], way["seconds"] + data["send_bytes"] / rate
    enough = (
        ("", "")
        if sent <= plan["free_bytes"]
        else (f"  {words.size(sent - plan['free_bytes'])} too little", "bold $error")
    )
    download = next((w["download_bytes"] for w in plan["ways"] if w["name"] == "hub"), 0)
    notes = [f"the host itself downloads {words.size(download)} from the hub"] if download else []
    notes += [f"not from the hub: {plan['hub_problem']}"] if plan["hub_problem"] else []
    rows += [
        Content(""),
        *(Content.assemble((words.clip(note, 2 * width), MUTED)) for note in notes),
        Content.assemble(
            ("u", "bold $footer-key-foreground"), f" sends {words.size(sent)} in about {words.seconds(seconds)}"
        )
        if sent
        else Content.assemble(("✓ ", "$success"), "all of it is there   ", key_hints(("3", "trains there"))),
        Content.assemble(
            (f"times at {words.size(rate)}/s, {words.size(plan['free_bytes'])} free there", MUTED), enough
        ),
    ]
    return lines(*rows)


def _way_row(
    label: str, send: float, there: float | None, seconds: float, name: int, marked: bool, cheapest: bool
) -> Content:
    style = "bold" if marked else ""
    figures = f"{words.size(send) if send else '–':>10}{words.size(there) if there else '–':>15}"
    return Content.assemble(
        ("▸ " if marked else "  ", "bold $accent"),
        (f"{words.clip(label, name - 1):<{name}}", style),
        (figures, style),
        (f"  {words.seconds(seconds) if seconds else '':<10}", MUTED),
        ("cheapest" if cheapest else "", "$success"),
    )


def upload_progress(follower: Follower, width: int) -> Content:
    """An upload at work: all of it, each item, and the current file."""
    model = follower.model
    if not model.items:
        return job_progress(follower, width)
    way = next((w for w in model.plan.get("ways", []) if w["name"] == model.plan.get("chosen")), {"send_bytes": 0})
    total = way["send_bytes"] + (model.plan.get("data") or {}).get("send_bytes", 0)
    sent = sum(item.done - (item.first or 0) for item in model.items.values())
    now = list(model.items.values())[-1]
    whole = Progress("all", "bytes", min(sent, total), total or None, recent=now.recent)
    label = max(8, *(len(name) for name in model.items))
    text = f"{words.size(sent)} of {words.size(total)} sent"
    pace = []
    if now.rate and sent < total:
        pace = [words.rate(now.rate, "bytes"), f"{words.seconds((total - sent) / now.rate)} left"]
    bar = max(8, min(40, width - label - 44))
    share = whole.fraction or 0.0
    head = Content.assemble(words.state(follower.state), "  ", (model.phase, "bold"), (f"  {model.phase_text}", MUTED))
    all_of_it = Content.assemble(
        (f"{'all':<{label}} ", "bold"),
        words.bar(bar, share, "$success"),
        (f" {100 * share:4.0f} % ", "bold"),
        (text, MUTED),
    )
    parts = [progress_line(item, width, label) for item in model.items.values() if item.total]
    streams = model.sending.get("streams")
    if streams:
        pace.append(f"{streams} stream{'s' if streams != 1 else ''}")
    said = "  ·  ".join(pace)
    file = words.clip(str(model.sending.get("file", "")), max(10, width - len(said) - 5), keep_end=True)
    at_hand = waiting("  ·  ".join((said, file))) if said else None
    return lines(*warnings(model.warnings[-2:]), head, "", all_of_it, *parts, at_hand)


def remote_end(follower: Follower) -> Content:
    """How an upload, a setup, or a machine's rent or end went."""
    result = follower.model.result
    if follower.model.command in ("rent", "end"):
        return job_end(follower)
    done = Content.assemble(
        words.state(follower.state), (f"  after {words.seconds(follower.model.elapsed_s)}  ", MUTED)
    )
    if follower.state != "finished":
        return job_end(follower)
    if "sent_bytes" not in result:
        changed = "installed" if result.get("changed") else "was there already"
        return lines(
            Content.assemble(done, f"surgvqa {result.get('version', '')} {changed}"), *warnings(follower.model.warnings)
        )
    merged = "; merged there" if result.get("merged_on_host") else ""
    return Content.assemble(done, f"{words.size(result['sent_bytes'])} sent, all files verified{merged}")


def setup_progress(follower: Follower, width: int) -> Content:
    """A setup at work: its phase, and the last lines of what runs there."""
    model = follower.model
    said = [waiting(words.clip(line, width)) for line in list(model.output)[-SHARDS_SHOWN:]]
    head = Content.assemble(words.state(follower.state), "  ", (model.phase, "bold"), (f"  {model.phase_text}", MUTED))
    return lines(*warnings(model.warnings[-2:]), head, "", *said)
