"""Small checkpoint folders for tests, written without torch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from surgvqa.checkpoint.headers import DTYPE_BYTES, header_bytes
from surgvqa.checkpoint.names import INDEX_FILE

Spec = dict[str, tuple[str, tuple[int, ...]]]


def random_bytes(count: int, seed: int) -> bytes:
    """Bytes whose every pair is a finite bf16 around ±1."""
    source = random.Random(seed)
    return b"".join(bytes((source.randrange(256), source.choice((0x3F, 0xBF)))) for _ in range((count + 1) // 2))[
        :count
    ]


def write_file(file: Path, spec: Spec, seed: int = 0) -> dict[str, bytes]:
    """One safetensors file of {name: (dtype, shape)} with made-up content; returns the bytes of each tensor."""
    content, entries = {}, []
    for number, (name, (dtype, shape)) in enumerate(spec.items()):
        size = DTYPE_BYTES[dtype]
        for n in shape:
            size *= n
        content[name] = random_bytes(size, seed + number)
        entries.append((name, dtype, shape, size))
    file.write_bytes(header_bytes(entries) + b"".join(content.values()))
    return content


def write_folder(folder: Path, shards: list[Spec], config: dict[str, Any] | None = None) -> dict[str, bytes]:
    """A checkpoint folder: a file a spec, an index when there are several; returns the bytes of each tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
    content: dict[str, bytes] = {}
    weight_map: dict[str, str] = {}
    for number, spec in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content |= write_file(folder / name, spec, seed=1000 * number)
        weight_map |= dict.fromkeys(spec, name)
    if len(shards) > 1:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return content


def read_tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a folder, read by our own header reader's offsets."""
    from surgvqa.checkpoint.folder import open_checkpoint

    found = {}
    for name, info in open_checkpoint(folder).require_sound().tensors.items():
        with open(info.file, "rb") as stream:
            stream.seek(info.offset)
            found[name] = stream.read(info.nbytes)
    return found
