"""What an upload consists of: items with every file's hash, and the cheaper of two ways to a merged checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal as human_bytes
from rich.table import Table

from remote.paths import remote_name
from remote.ssh.connection import Remote
from remote.upload import hub
from remote.upload.hashes import Hashes, Item
from remote.upload.options import UploadOptions
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs.reporter import Reporter
from surgvqa.terminal.figures import human_seconds

MERGE_BYTES_PER_S = 300e6  # reading, arithmetic and writing on a rented host; an estimate, shown as one
HUB_BYTES_PER_S = 100e6  # from the hub to a data centre; an estimate as well


# --- items -----------------------------------------------------------------------------------------------------------


def folder_sources(folder: Path) -> list[tuple[Path, str]]:
    """Every file of a checkpoint or adapter folder, weights last: configuration arrives first."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and not f.name.startswith(".")]
    if not files:
        raise UsageError(f"{folder}: the folder is empty")
    return sorted(((f, f.relative_to(folder).as_posix()) for f in files), key=lambda s: s[0].suffix == ".safetensors")


def data_sources(options: Any, workspace: Workspace) -> list[tuple[Path, str]]:
    """The JSONL files and only the frames and spoken questions that they name."""
    from surgvqa.data.lookup import AudioIndex, FrameIndex
    from surgvqa.data.samples import read_samples

    found: dict[str, Path] = {}

    def add(file: Path, name: str) -> None:
        if found.setdefault(name, file) != file:
            raise UsageError(f"{file} and {found[name]} would both be {name} on the host; rename one")

    pairs = [
        (options.train_data_path, options.audio_dir),
        (options.eval_data_path, options.eval_audio_dir or options.audio_dir),
    ]
    for jsonl, audio_dir in pairs:
        if jsonl is None:
            continue
        for needed, name in ((options.frames_dir, "frames_dir"), (audio_dir, "audio_dir")):
            if needed is None:
                raise UsageError(f"missing --{name} for {jsonl} (or the key of that name in {workspace.file})")
        samples = read_samples(jsonl)
        add(Path(jsonl), remote_name(jsonl, workspace))
        frames, audio = FrameIndex(options.frames_dir), AudioIndex(audio_dir, samples)
        frames_name, audio_name = remote_name(options.frames_dir, workspace), remote_name(audio_dir, workspace)
        for sample in samples:
            for frame in sample.frames:
                file = frames.find(frame)
                add(file, f"{frames_name}/{file.relative_to(options.frames_dir).as_posix()}")
            file = audio.find(sample)
            add(file, f"{audio_name}/{file.relative_to(audio_dir).as_posix()}")
            for side in ("in", "out"):  # the question sets by which AudioIndex tells the two wordings apart
                for place, folder in ((Path(jsonl).parent, None), (Path(audio_dir), audio_name)):
                    wording = place / f"{side}_{sample.video_id}.jsonl"
                    if wording.is_file() and wording != Path(jsonl):
                        add(wording, f"{folder}/{wording.name}" if folder else remote_name(wording, workspace))
    if found:
        for file in sorted((workspace.root / "presets").glob("*.toml")):
            add(file, f"presets/{file.name}")
    return [(file, name) for name, file in sorted(found.items())]


# --- the plan --------------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """One way to have the checkpoint on the host."""

    name: str
    """merged (send the merged checkpoint), adapter (send Stage 1 and the adapter, merge there) or hub (the same, but
    the host gets Stage 1 itself)."""
    items: list[Item]
    send_bytes: int
    merge_bytes: int = 0
    """What the host would have to merge."""
    stage1: str = ""
    """Stage 1's folder in the host's workspace, for the merge."""
    hub_id: str = ""
    output: str = ""
    """The merged checkpoint's name in the workspace there, where it is merged there."""
    download_bytes: int = 0
    """What the host would have to get from the hub."""

    def merge(self) -> dict[str, str]:
        """What is merged there into what, by their names in the workspace there."""
        return {"stage1": self.stage1, "adapter": self.items[-1].name, "output": self.output}

    def seconds(self, bytes_per_s: float) -> float:
        """Sending at this rate; downloading and merging at estimated ones."""
        there = self.download_bytes / HUB_BYTES_PER_S + self.merge_bytes / MERGE_BYTES_PER_S
        return self.send_bytes / bytes_per_s + there


def cheapest(ways: list[Way], bytes_per_s: float) -> Way:
    """The way that is over first."""
    if not ways:
        raise SurgvqaError("no checkpoint to send")
    return min(ways, key=lambda way: way.seconds(bytes_per_s))


RATES = Path("~/.cache/surgvqa/rates.json")
WAYS = {
    "merged": "merged checkpoint",
    "adapter": "Stage 1 + adapter, merged there",
    "hub": "Stage 1 from the hub + adapter, merged there",
}


def checkpoint_ways(options: UploadOptions, workspace: Workspace, hashes: Hashes, run: Reporter) -> list[Way]:
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
    chosen = cheapest(ways, rate) if ways else None
    return {
        "way": chosen,
        "chosen": chosen.name if chosen else None,
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
