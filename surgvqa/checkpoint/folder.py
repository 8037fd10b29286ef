"""Checkpoint folders on disk: safetensors headers, index, key names, sizes. Reads headers, never weights.

This program uses the checkpoint's own (old) key names everywhere; `to_old_name` maps the names that newer tools write.
Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.checkpoint.headers import MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo, no_file, read_header
from surgvqa.checkpoint.names import INDEX_FILE, SINGLE_FILE, to_old_name
from surgvqa.errors import UsageError
from surgvqa.files import read_json
from surgvqa.untrusted import of_kinds

SHARD_NAME = re.compile(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,200}\.safetensors")

# --- a folder --------------------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """A folder of weights: every tensor by its old name, in file order."""

    folder: Path
    config: dict[str, Any]
    """config.json; {} when there is none."""
    tensors: dict[str, TensorInfo]
    files: list[Path]
    problems: list[str] = field(default_factory=list)
    """What is wrong with files, headers, index and config.json; empty for a valid checkpoint."""
    warnings: list[str] = field(default_factory=list)
    """Files in the folder that are not part of the checkpoint."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def require_sound(self) -> Checkpoint:
        """Returns the checkpoint itself. Raises UsageError with the first problem if there are any."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more: surgvqa audit lists them)" if self.problems[1:] else ""
            raise UsageError(self.problems[0] + more)
        return self


OBJECTS = (
    "text_config", "vision_config", "audio_encoder_config", "rope_parameters", "rope_scaling", "quantization_config",
)  # fmt: skip
"""Keys of config.json whose value is an object or null."""


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Reads every header of a checkpoint folder. Raises UsageError when the folder is not a checkpoint."""
    folder = as_on_disk(Path(folder))
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such checkpoint folder")
    visible = sorted(f for f in folder.glob("*.safetensors") if f.is_file() and not f.name.startswith("."))
    present = [f for f in visible if f.name != "adapter_model.safetensors"]  # macOS writes ._* files beside others
    index, problems = _read_index(folder)
    warnings: list[str] = []
    if index:
        files = sorted({folder / name for name in index.values()})
        problems += [f"{file}: named in {INDEX_FILE}, but {no_file(file)}" for file in files if not file.is_file()]
        stray = [f for f in present if f not in files]
        if folder / SINGLE_FILE in stray:  # transformers would load it instead of the shards in the index
            problems.append(f"{folder / SINGLE_FILE}: not named in {INDEX_FILE} beside it; move one of them away")
        warnings += [f"{f}: not named in {INDEX_FILE}, so not read" for f in stray if f.name != SINGLE_FILE]
        files = [f for f in files if f.is_file()]
    elif present:
        files = [folder / SINGLE_FILE] if folder / SINGLE_FILE in present else present
        warnings += [f"{f}: beside {SINGLE_FILE}, so not read" for f in present if f not in files]
        if len(files) > 1:
            problems.append(f"{folder}: {len(files)} shards and no {INDEX_FILE}")
    elif (folder / "adapter_model.safetensors").is_file() or (folder / "adapter_config.json").is_file():
        raise UsageError(f"{folder}: this is an adapter, not a full checkpoint; give it as --stage2_adapter_path")
    elif any(folder.glob("*.bin")):
        raise UsageError(f"{folder}: only .bin weights; save the checkpoint as safetensors first")
    else:
        raise UsageError(f"{folder}: no *.safetensors file in it; is this the checkpoint folder?")

    config, wrong = _read_config(folder / "config.json")
    problems += wrong
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        found, wrong = read_header(file)
        problems += wrong
        if len(tensors) + len(found) > MAX_TENSORS:
            problems.append(
                f"{folder}: more than {MAX_TENSORS} tensors in its shards; those from {file.name} on are left out"
            )
            break
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
    stored = {(t.file.name, t.name) for t in tensors.values()}
    read = {file for file, _ in stored}
    if index:
        names = {t.name for t in tensors.values()}
        problems += [
            f"{folder / shard}: {name}: in {INDEX_FILE}, but not in the file"
            for name, shard in index.items()
            if (shard, name) not in stored and name not in names and shard in read
        ]
    return Checkpoint(folder, config, tensors, files, problems, warnings)


def as_on_disk(path: Path) -> Path:
    """`path`, or the file there whose name differs only in Unicode normalisation: macOS writes é as two code points."""
    if path.exists() or path.parent == path:
        return path
    parent = as_on_disk(path.parent)
    wanted = unicodedata.normalize("NFC", path.name)
    if not wanted.isascii() and parent.is_dir():
        for found in parent.iterdir():
            if unicodedata.normalize("NFC", found.name) == wanted:
                return found
    return parent / path.name


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint or adapter. Raises UsageError for other content or a file too large."""
    if file.is_file() and file.stat().st_size > MAX_HEADER_BYTES:
        raise UsageError(f"{file}: {file.stat().st_size} bytes, expected {MAX_HEADER_BYTES} at most")
    return read_json(file)


def _read_config(file: Path) -> tuple[dict[str, Any], list[str]]:
    """config.json without its entries of the wrong type, and what is wrong with it."""
    if not file.is_file():
        return {}, [f"{file}: {no_file(file)}"]
    config = read_object(file)
    if not config:
        return {}, [f"{file}: is empty"]
    kinds = {"model_type": "text", "tie_word_embeddings": "true or false", **dict.fromkeys(OBJECTS, "an object")}
    config, wrong = of_kinds(config, kinds)
    if config.get("text_config"):
        config["text_config"], inner = of_kinds(config["text_config"], kinds)
        wrong += [f"text_config.{text}" for text in inner]
    return config, [f"{file}: {text}" for text in wrong]


def _read_index(folder: Path) -> tuple[dict[str, str], list[str]]:
    """{tensor: shard file} and what is wrong with the index; ({}, []) when there is no index."""
    file = folder / INDEX_FILE
    if not file.is_file():
        return {}, [f"{file}: {no_file(file)}"] if os.path.lexists(file) else []
    weight_map = read_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        return {}, [f"{file}: no weight_map in it"]
    if len(weight_map) > MAX_TENSORS:
        raise UsageError(f"{file}: {len(weight_map)} tensors in weight_map, expected {MAX_TENSORS} at most")
    outside = [name for name in weight_map.values() if not isinstance(name, str) or not SHARD_NAME.fullmatch(name)]
    if outside:
        raise UsageError(f"{file}: shard name {repr(outside[0])[:80]} is not the plain name of a .safetensors file")
    return weight_map, []


# --- sizes given as text ----------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Bytes in `5GB`, `800MB`, `2GiB` or `1000000`; GB = 1e9, GiB = 2**30. Raises UsageError for other text."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    number, prefix, binary = match.groups() if match else ("0", "", "")
    size = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))
    if size < 1:
        raise UsageError(f"--max_shard_size {text}: expected a size such as 5GB or 800MB")
    return size
