"""Checkpoint folders as they lie on disk: safetensors headers, index, key names, sizes. Reads headers, never weights.

A safetensors file is 8 bytes (little-endian length), a JSON header {name: {dtype, shape, data_offsets}}, then the data
(https://github.com/huggingface/safetensors, "Format"). Key names are the checkpoint's own (old) ones everywhere in this
program; `to_old_name` maps what newer tools write. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.checkpoint.headers import TensorInfo, read_header
from surgvqa.checkpoint.names import INDEX_FILE, SINGLE_FILE, to_old_name
from surgvqa.errors import UsageError
from surgvqa.files import read_json

# --- a folder --------------------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """A folder of weights: every tensor by its old name, in the order of the files."""

    folder: Path
    config: dict[str, Any]
    """config.json; {} when there is none."""
    tensors: dict[str, TensorInfo]
    files: list[Path]
    problems: list[str] = field(default_factory=list)
    """What is wrong with files, headers and index; empty for a sound checkpoint."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def require_sound(self) -> Checkpoint:
        """Itself; UsageError with the first problem when there is one."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more: surgvqa audit lists them)" if self.problems[1:] else ""
            raise UsageError(self.problems[0] + more)
        return self


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Reads every header of a checkpoint folder. UsageError when it is no checkpoint folder at all."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such checkpoint folder")
    present = sorted(f for f in folder.glob("*.safetensors") if f.name != "adapter_model.safetensors")
    index, problems = _read_index(folder)
    if index:
        files = sorted({folder / name for name in index.values()})
        problems += [f"{file}: named in {INDEX_FILE}, but missing" for file in files if not file.is_file()]
        stray = [f for f in present if f not in files]
        problems += [f"{file}: not named in {INDEX_FILE}" for file in stray]
        files = [f for f in files if f.is_file()]
    elif present:
        files = [folder / SINGLE_FILE] if folder / SINGLE_FILE in present else present
        if len(files) > 1:
            problems.append(f"{folder}: {len(files)} shards and no {INDEX_FILE}")
    elif (folder / "adapter_model.safetensors").is_file() or (folder / "adapter_config.json").is_file():
        raise UsageError(f"{folder}: this is an adapter, not a full checkpoint; give it as --stage2_adapter_path")
    elif any(folder.glob("*.bin")):
        raise UsageError(f"{folder}: only .bin weights; save the checkpoint as safetensors first")
    else:
        raise UsageError(f"{folder}: no *.safetensors file in it; is this the checkpoint folder?")

    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not config:
        empty = (folder / "config.json").is_file()
        problems.append(f"{folder / 'config.json'}: {'has nothing in it' if empty else 'missing'}")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        found, wrong = read_header(file)
        problems += wrong
        for info in found.values():
            name = to_old_name(info.name)
            if name in tensors:
                problems.append(f"{file}: {info.name}: also in {tensors[name].file.name}")
            tensors.setdefault(name, info)
            if index and index.get(info.name) != file.name:
                where = index.get(info.name)
                problems.append(
                    f"{file}: {info.name}: " + (f"{INDEX_FILE} says {where}" if where else f"not in {INDEX_FILE}")
                )
    held = {(t.file.name, t.name) for t in tensors.values()}
    if index:
        names = {t.name for t in tensors.values()}
        problems += [
            f"{folder / shard}: {name}: in {INDEX_FILE}, but not in the file"
            for name, shard in index.items()
            if (shard, name) not in held and name not in names and (folder / shard).is_file()
        ]
    return Checkpoint(folder, config, tensors, files, problems)


def _read_index(folder: Path) -> tuple[dict[str, str], list[str]]:
    """{tensor: shard file} and what is wrong with the index; ({}, []) without an index."""
    file = folder / INDEX_FILE
    if not file.is_file():
        return {}, []
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        return {}, [f"{file}: no weight_map in it"]
    outside = [n for n in weight_map.values() if not isinstance(n, str) or os.path.basename(n) != n]
    if outside:
        raise UsageError(f"{file}: shard name {outside[0]!r} is no plain file name")
    return weight_map, []


# --- what the sizes say ----------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """`5GB`, `800MB`, `2GiB`, `1000000` as bytes; GB = 1e9, GiB = 2**30."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    number, prefix, binary = match.groups() if match else ("0", "", "")
    size = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))
    if size < 1:
        raise UsageError(f"--max_shard_size {text}: expected a size such as 5GB or 800MB")
    return size
