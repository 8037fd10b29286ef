"""What an upload consists of: items with every file's hash, and the cheaper of two ways to a merged checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rich.filesize import decimal as human_bytes
from rich.table import Table

from remote.paths import remote_name
from remote.ssh.connection import Remote
from remote.ssh.errors import not_understood
from remote.upload import hub
from remote.upload.hashes import Hashes, Item, whole_file
from remote.upload.offers import ask_of_all
from remote.upload.options import UploadOptions
from remote.upload.remembered import known_rate
from surgvqa.checkpoint.names import INDEX_FILE
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.files import read_json
from surgvqa.runs.reporter import Reporter
from surgvqa.terminal.figures import human_seconds
from surgvqa.untrusted import one_line

MERGE_BYTES_PER_S = 300e6  # reading, arithmetic and writing on a rented host; an estimate, shown as one
USUAL_BYTES_PER_S = 30e6  # of a link that nothing is known of
HUB_BYTES_PER_S = 100e6  # from the hub to a data centre; an estimate as well


# --- items -----------------------------------------------------------------------------------------------------------


LEFT_OUT_OF_SIGHT = 8  # names that the warning about what is not sent spells out


def is_checkpoint_file(path: str) -> bool:
    """Whether a file of a checkpoint or adapter folder, by its path in it, belongs to what loads it.

    Weights (safetensors, and an adapter's .bin) and what describes them, all directly in the folder, as transformers
    and PEFT save them; chat templates have a folder of their own. Training states, clones and caches are not.
    """
    folder, _, name = path.rpartition("/")
    if name.startswith(".") or folder not in ("", "additional_chat_templates"):
        return False
    return name in ADAPTER_BINARY or name in PLAIN_FILES or PurePosixPath(name).suffix in CHECKPOINT_SUFFIXES


CHECKPOINT_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")
WEIGHT_SUFFIXES = (".safetensors", ".bin")
ADAPTER_BINARY = ("adapter_model.bin",)
PLAIN_FILES = ("LICENSE", "NOTICE")
TRAINING_FILES = ("trainer_state.json",)


def folder_sources(folder: Path, left_out: list[str] | None = None) -> list[tuple[Path, str]]:
    """The files of a checkpoint or adapter folder, (file here, path in it), weights last: configuration arrives first.

    What is not sent is added to `left_out`, as "path (why)". Raises UsageError for a weight or configuration file that
    cannot be sent: a dangling link, no regular file, a git-LFS pointer.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    found: list[tuple[Path, str]] = []
    skipped: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        _require_end(entry)
        if entry.is_dir() and entry.name.endswith(CHECKPOINT_SUFFIXES):
            raise UsageError(f"{entry.path}: a folder, expected a file")
        if entry.is_dir() and entry.name != "additional_chat_templates":
            why = "a saved training state" if entry.name.startswith("checkpoint-") else "a folder"
            skipped.append(f"{entry.name}/ ({why})")
        elif entry.is_dir():
            found += [(f, f.relative_to(folder).as_posix()) for f in sorted(Path(entry.path).glob("*.jinja"))]
        elif entry.name in TRAINING_FILES or not is_checkpoint_file(entry.name):
            skipped.append(f"{entry.name} (no file that a checkpoint is loaded from)")
        else:
            found.append((Path(entry.path), entry.name))
    for file, name in found:
        if not whole_file(str(file)).st_size and name.endswith(WEIGHT_SUFFIXES):
            raise UsageError(f"{file}: empty, expected weights; download it again")
    if left_out is not None:
        left_out += skipped
    if not found:
        raise UsageError(f"{folder}: no file of a checkpoint or adapter in it")
    _require_named_shards(folder, {path for _, path in found})
    return sorted(found, key=lambda s: s[0].suffix == ".safetensors")


def _require_end(entry: os.DirEntry[str]) -> None:
    """UsageError for a link that leads to itself."""
    try:
        entry.is_dir()
    except OSError as error:
        raise UsageError(f"{entry.path}: {error.strerror}") from None


def _require_named_shards(folder: Path, paths: set[str]) -> None:
    """UsageError when the index names a shard that is not there."""
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        named = {str(shard) for shard in weight_map.values()} if isinstance(weight_map, dict) else set()
        if missing := sorted(named - paths):
            raise UsageError(f"{folder / missing[0]}: named in {INDEX_FILE}, but missing")


def data_sources(options: Any, workspace: Workspace) -> list[tuple[str, str]]:
    """The JSONL files and only the frames and spoken questions that they name."""
    from surgvqa.data.lookup import AudioIndex, FrameIndex
    from surgvqa.data.samples import read_samples

    found: dict[str, str] = {}

    def add(more: dict[str, str]) -> None:
        """Name there -> file here."""
        if name := next((name for name in found.keys() & more.keys() if found[name] != more[name]), None):
            raise UsageError(f"{more[name]} and {found[name]} would both be {name} on the host; rename one")
        found.update(more)

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
        add({remote_name(jsonl, workspace): os.fspath(jsonl)})
        frames, audio = FrameIndex(options.frames_dir), AudioIndex(audio_dir, samples)
        frames_name, audio_name = remote_name(options.frames_dir, workspace), remote_name(audio_dir, workspace)
        named = map(frames.name_of, {frame: None for sample in samples for frame in sample.frames})
        root = str(frames.root)
        add({f"{frames_name}/{name}": f"{root}/{name}" for name in named})
        root = str(audio.root)
        add({audio_name + file[len(root) :]: file for file in map(str, map(audio.find, samples))})
        for video in dict.fromkeys(sample.video_id for sample in samples):
            for side in ("in", "out"):  # the question sets by which AudioIndex tells the two wordings apart
                for place, below in ((Path(jsonl).parent, None), (Path(audio_dir), audio_name)):
                    wording = place / f"{side}_{video}.jsonl"
                    if wording.is_file() and wording != Path(jsonl):
                        name = f"{below}/{wording.name}" if below else remote_name(wording, workspace)
                        add({name: str(wording)})
    if found:
        for preset in sorted((workspace.root / "presets").glob("*.toml")):
            add({f"presets/{preset.name}": str(preset)})
    return [(file, name) for name, file in sorted(found.items())]


# --- the plan --------------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """One way to get the checkpoint to the host."""

    name: str
    """merged (send the merged checkpoint), adapter (send Stage 1 and the adapter, merge there) or hub (the same, but
    the host gets Stage 1 itself)."""
    items: list[Item]
    send_bytes: int
    merge_bytes: int = 0
    """Bytes that the host would have to merge."""
    stage1: str = ""
    """Stage 1's folder in the host's workspace, for the merge."""
    hub_id: str = ""
    output: str = ""
    """Name of the checkpoint in the host's workspace, if it is merged there."""
    download_bytes: int = 0
    """Bytes that the host would have to download from the hub."""

    def merge(self) -> dict[str, str]:
        """Names of the merge's inputs and output in the host's workspace."""
        return {"stage1": self.stage1, "adapter": self.items[-1].name, "output": self.output}

    def seconds(self, bytes_per_s: float) -> float:
        """Seconds to send at this rate, and to download and merge at estimated rates."""
        there = self.download_bytes / HUB_BYTES_PER_S + self.merge_bytes / MERGE_BYTES_PER_S
        return self.send_bytes / bytes_per_s + there


def cheapest(ways: list[Way], bytes_per_s: float) -> Way:
    """The fastest way."""
    if not ways:
        raise SurgvqaError("no checkpoint to send")
    return min(ways, key=lambda way: way.seconds(bytes_per_s))


WAYS = {
    "merged": "merged checkpoint",
    "adapter": "Stage 1 + adapter, merged there",
    "hub": "Stage 1 from the hub + adapter, merged there",
}


def checkpoint_ways(options: UploadOptions, workspace: Workspace, hashes: Hashes, run: Reporter) -> list[Way]:
    """The possible ways to the checkpoint, judged by the files here. send_bytes still counts everything."""
    ways = []

    def item(path: str) -> Item:
        left_out: list[str] = []
        sources = folder_sources(Path(path), left_out)
        if left_out:
            more = f" and {len(left_out) - LEFT_OUT_OF_SIGHT} more" if len(left_out) > LEFT_OUT_OF_SIGHT else ""
            run.warning(one_line(f"{path}: not sent: {', '.join(left_out[:LEFT_OUT_OF_SIGHT])}{more}"))
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


@dataclass(frozen=True)
class Early:
    """The host's answer about the items of the last upload, asked while this computer checks its own files.

    Usually nothing has changed, and then no further question is needed.
    """

    offers: list[dict[str, str]]
    answer: dict[str, Any]


class Standing:
    """The state of an upload's items on the host, from its answer."""

    def __init__(self, remote: Remote, items: list[Item], answer: dict[str, Any]):
        """Raises SurgvqaError for an answer about other items."""
        if len(answer["items"]) != len(items):
            raise not_understood(remote.host, f"it knows {len(answer['items'])} items of {len(items)}")
        self.answer = answer
        self.published = {i.digest for i, stand in zip(items, answer["items"]) if stand.get("published")}
        """Digests of the items that the host has completely, with a record."""
        self._of = dict(zip(map(id, items), answer["items"]))

    def of(self, item: Item) -> dict[str, Any]:
        """What the host says of one (`known` in remote/agent/standing.py)."""
        stand: dict[str, Any] = self._of[id(item)]
        return stand

    def foreign(self, item: Item) -> list[str]:
        """Files in the way of an item that surgvqa did not make."""
        stand = self.of(item)
        return list(stand["foreign"]) if stand["state"] == "foreign" else []

    def missing(self, item: Item) -> int:
        """Bytes of it that the host lacks."""
        stand = self.of(item)
        if stand["state"] == "complete":
            return 0
        have = set(stand["have"])
        return sum(entry.size for index, entry in enumerate(item.entries) if index not in have)


def compare(
    remote: Remote, ways: list[Way], data: list[Item], checksum: bool = False, early: Early | None = None
) -> dict[str, Any]:
    """Asks the host what it has, and finds the fastest way.

    `checksum`: the host reads its files again. `early`: an answer that it has already given.
    """
    standing = ask_standing(remote, [item for way in ways for item in way.items] + data, checksum, early)
    ways = open_ways(remote, ways, data, standing)
    for way in ways:
        way.send_bytes = sum(map(standing.missing, way.items))
        if way.output and not way.send_bytes and remote.ask("merged", **way.merge())["same"]:
            way.merge_bytes = 0
    hub_problem = drop_closed_hub(remote, ways, standing)
    rate = known_rate(remote.host.name) or USUAL_BYTES_PER_S
    chosen = cheapest(ways, rate) if ways else None
    return {
        "way": chosen,
        "published": standing.published,
        "chosen": chosen.name if chosen else None,
        "hub_problem": hub_problem,
        "bytes_per_s": rate,
        "free_bytes": standing.answer["free"],
        "stagings": standing.answer["stagings"],
        "data": data_row(data, standing),
        "ways": [way_row(way, rate) for way in ways],
    }


def ask_standing(remote: Remote, items: list[Item], checksum: bool, early: Early | None) -> Standing:
    """The state of these items: from the early answer if it is about them, otherwise the host is asked now."""
    if early and early.offers == [item.offer for item in items] and "want" not in early.answer:
        return Standing(remote, items, early.answer)
    return Standing(remote, items, ask_of_all(remote, "known", items, checksum=checksum))


def open_ways(remote: Remote, ways: list[Way], data: list[Item], standing: Standing) -> list[Way]:
    """The ways that no foreign files block. Raises SurgvqaError if none is left, or if the data is blocked."""
    found = [way for way in ways if not any(map(standing.foreign, way.items))]
    blocked = [name for item in data for name in standing.foreign(item)]
    if blocked or (ways and not found):
        blocked = [name for way in ways for item in way.items for name in standing.foreign(item)] + blocked
        raise SurgvqaError(
            f"{remote.host.name}: {one_line(', '.join(blocked[:3]))} exists in the workspace there and was not made by "
            "upload; move it away or give yours another name"
        )
    return found


def drop_closed_hub(remote: Remote, ways: list[Way], standing: Standing) -> str:
    """Fills in the ways over the hub and removes one that is impossible. Returns the reason, or ''.

    Raises SurgvqaError if no way is left.
    """
    problem = ""
    for way in [way for way in ways if way.hub_id]:
        problem = settle_hub(remote, way, standing.missing)
        if problem:
            ways.remove(way)
    if problem and not ways:
        raise SurgvqaError(f"{remote.host.name}: {problem}")
    return problem


def way_row(way: Way, rate: float) -> dict[str, Any]:
    """The row of a way in a plan."""
    return {
        "name": way.name,
        "items": [item.name for item in way.items],
        "total_bytes": sum(item.bytes for item in way.items),
        "send_bytes": way.send_bytes,
        "merge_bytes": way.merge_bytes,
        "download_bytes": way.download_bytes,
        "seconds": way.seconds(rate),
    }


def data_row(data: list[Item], standing: Standing) -> dict[str, Any]:
    """The row of the data in a plan."""
    stands = [standing.of(item) for item in data]
    return {
        "files": sum(len(item.entries) for item in data),
        "send_bytes": sum(map(standing.missing, data)),
        "stale_files": sum(stand["stale_files"] for stand in stands),
        "stale": [path for stand in stands for path in stand["stale"]],
        "replaced": any(stand["replaced"] for stand in stands),
    }


def settle_hub(remote: Remote, way: Way, missing: Callable[[Item], int]) -> str:
    """Fills in what the host would download and what is left to send. Returns why it cannot download, or ''.

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
            folder = os.path.dirname(stage1.entries[0].source)
            return f"{way.hub_id}: {wrong[0]} is another there than in {folder}; name its revision: USER/NAME@REVISION"
        own = sum(entry.size for entry in stage1.entries if entry.path not in found["files"])
        way.send_bytes = missing(way.items[1]) + own
    else:
        way.merge_bytes = sum(size for path, (size, _) in found["files"].items() if path.endswith(".safetensors"))
    way.download_bytes = found["download_bytes"]
    return ""


def public(plan: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in plan.items() if k not in ("way", "published", "stagings")}


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
