"""Checkpoint folders as they lie on disk: safetensors headers, index, key names, sizes. Reads headers, never weights.

A safetensors file is 8 bytes (little-endian length), a JSON header {name: {dtype, shape, data_offsets}}, then the data
(https://github.com/huggingface/safetensors, "Format"). Key names are the checkpoint's own (old) ones everywhere in this
program; `to_old_name` maps what newer tools write. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.errors import UsageError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
META = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")

OLD_NAMES: tuple[tuple[str, str], ...] = (
    (r"^model\.language_model\.", "model."),
    (r"^model\.visual\.", "visual."),
    (r"^model\.(audio_encoder|audio_projector)(\.|$)", r"\1\2"),
    (r"^model\.lm_head(\.|$)", r"lm_head\1"),
)
"""What transformers 5 calls a module -> what the checkpoint's own files call it; the first rule that matches."""

CARRIED_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip
"""What a checkpoint folder holds besides weights and config.json, and a copy of it must hold too."""


def to_old_name(name: str) -> str:
    """The checkpoint's own (old) name of a tensor or module; an old name stays as it is."""
    for pattern, replacement in OLD_NAMES:
        renamed, found = re.subn(pattern, replacement, name)
        if found:
            return renamed
    return name


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor in one file."""

    name: str
    """The name as the file has it."""
    dtype: str
    """As safetensors spells it: BF16, F16, F32, …"""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Of its first byte, from the start of the file."""
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def usable_cores() -> int:
    """Cores that this process may run on; macOS only tells how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- one file --------------------------------------------------------------------------------------------------------


def read_header(file: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of one safetensors file, and what is wrong with it, each problem a line that names the file.

    A file whose header cannot be read at all gives no tensors and one problem.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                return {}, [f"{file}: truncated or no safetensors file ({size} bytes)"]
            document = json.loads(stream.read(length))
        entries = [(k, v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in document.items() if k != META]
        if not all(isinstance(n, int) and n >= 0 for e in entries for n in (*e[2], e[3], e[4])):
            raise ValueError("negative or fractional sizes")
    except OSError as error:
        return {}, [f"{file}: cannot be read: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{file}: damaged header: {error}"]

    problems, data = [], 8 + length
    end_of_last, last = 0, ""
    for name, dtype, shape, begin, end in sorted(entries, key=lambda e: (e[3], e[4])):
        if dtype not in DTYPE_BYTES:
            problems.append(f"{file}: {name}: unknown dtype {dtype}")
        elif end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
            wanted = math.prod(shape) * DTYPE_BYTES[dtype]
            problems.append(f"{file}: {name}: {end - begin} bytes, but {dtype} {list(shape)} needs {wanted}")
        if begin < end_of_last:
            problems.append(f"{file}: {name}: overlaps the data of {last}")
        elif begin > end_of_last:
            problems.append(f"{file}: {begin - end_of_last} bytes that belong to no tensor before {name}")
        if data + end > size:
            problems.append(f"{file}: {name}: truncated: data ends at byte {data + end}, the file at {size}")
        end_of_last, last = max(end_of_last, end), name
    if entries and data + end_of_last < size:
        problems.append(f"{file}: {size - data - end_of_last} bytes after the last tensor")
    tensors = {
        n: TensorInfo(n, dtype, shape, file, data + begin, end - begin) for n, dtype, shape, begin, end in entries
    }
    return tensors, problems


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The head of a safetensors file for (name, dtype, shape, nbytes) laid down one after the other."""
    document: dict[str, Any] = {META: {"format": "pt"}}
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    return len(text).to_bytes(8, "little") + text


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


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; UsageError when it is missing, damaged or something else."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file") from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{file}: expected a JSON object, found {type(document).__name__}")
    return document


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
        problems.append(f"{folder / 'config.json'}: missing")
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


def whisper_config(tensors: Mapping[str, TensorInfo], prefix: str = "audio_encoder.") -> dict[str, Any] | None:
    """The audio encoder's sizes in WhisperConfig's field names, read off the tensor shapes; None without an encoder.

    The number of heads is not in any shape: Whisper's heads are 64 wide in every size (Radford et al. 2022, table 1).
    """

    def shape(name: str) -> tuple[int, ...] | None:
        info = tensors.get(prefix + name)
        return info.shape if info else None

    conv1, positions, fc1 = shape("conv1.weight"), shape("embed_positions.weight"), shape("layers.0.fc1.weight")
    if not (conv1 and positions and fc1 and len(conv1) == 3 and len(positions) == 2):
        return None
    layers = {int(m[1]) for name in tensors if (m := re.match(re.escape(prefix) + r"layers\.(\d+)\.", name))}
    return {
        "model_type": "whisper",
        "d_model": conv1[0],
        "encoder_layers": len(layers),
        "encoder_attention_heads": max(1, conv1[0] // 64),
        "encoder_ffn_dim": fc1[0],
        "num_mel_bins": conv1[1],
        "max_source_positions": positions[0],
    }


def quantisation(checkpoint: Checkpoint) -> str | None:
    """What says that the weights are quantised, in words; None for plain weights."""
    config = checkpoint.config.get("quantization_config") or {}
    four_bit = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
    packed = (".SCB", ".qweight", ".qzeros", ".g_idx", ".weight_scale", ".weight_packed")
    marked = next((name for name in checkpoint.tensors if name.endswith(four_bit)), None)
    if marked or config.get("load_in_4bit") or config.get("_load_in_4bit"):
        return f"this checkpoint is 4-bit ({marked or 'quantization_config in config.json'})"
    found = next((name for name in checkpoint.tensors if name.endswith(packed)), None)
    if found or config:
        method = config.get("quant_method") or "packed weights"
        return f"this checkpoint is quantised ({method}{', ' + found if found else ''})"
    return None


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as the old fork reads it: the language model's keys at the top level, under their old names.

    transformers 5 nests them in `text_config` and folds rope_theta into `rope_parameters`.
    """
    flat = {k: v for k, v in config.items() if k != "text_config"}
    for key, value in (config.get("text_config") or {}).items():
        if key not in ("model_type", "architectures", "transformers_version"):
            flat.setdefault(key, value)
    rope = flat.pop("rope_parameters", None)
    if rope:
        flat.setdefault("rope_theta", rope.get("rope_theta"))
        flat.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
    dtype = flat.pop("dtype", None)
    if dtype:
        flat.setdefault("torch_dtype", dtype)
    return flat


def parse_size(text: str) -> int:
    """`5GB`, `800MB`, `2GiB`, `1000000` as bytes; GB = 1e9, GiB = 2**30."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    try:
        number = float(match[1])  # type: ignore[index]
        size = int(number * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))  # type: ignore[index]
        if size < 1:
            raise ValueError
        return size
    except (TypeError, ValueError):
        raise UsageError(f"--max_shard_size {text}: expected a size such as 5GB or 800MB") from None
