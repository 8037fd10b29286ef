"""Small checkpoint folders for tests, written without torch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from surgvqa import files
from surgvqa.checkpoint.folder import open_checkpoint
from surgvqa.checkpoint.headers import DTYPE_BYTES, header_bytes
from surgvqa.checkpoint.names import INDEX_FILE
from surgvqa.checkpoint.shards import Copy, Files, plan_shards
from surgvqa.checkpoint.writer import NewCheckpoint, Writer, file_identity

Spec = dict[str, tuple[str, tuple[int, ...]]]
SHARDS = [{f"layer.{k}.{i}": ("BF16", (30, 7 + i)) for i in range(4)} for k in range(5)]
PAGES = [{f"layer.{k}.{i}": ("BF16", (30, 3 + 70 * i)) for i in range(4)} for k in range(5)]
"""Shards of several pages each; no tensor ends with a page."""


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
    found = {}
    for name, info in open_checkpoint(folder).require_sound().tensors.items():
        with open(info.file, "rb") as stream:
            stream.seek(info.offset)
            found[name] = stream.read(info.nbytes)
    return found


# --- jobs of the writer


class Recorder:
    """Stands in for Run."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})

    def phase(self, name: str, text: str = "") -> None:
        self.emit("phase", name=name, text=text)

    def warning(self, text: str) -> None:
        self.emit("warning", text=text)

    def progress(self, phase: str, done: float, total: float, unit: str, **fields: Any) -> None:
        self.emit("progress", phase=phase, done=done, total=total, **fields)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["kind"] == kind]


def new_checkpoint(base: Path, output: Path, max_bytes: int = 2000) -> NewCheckpoint:
    checkpoint, files = open_checkpoint(base), Files()
    return NewCheckpoint(
        output=output,
        shards=plan_shards([Copy(n, t, files) for n, t in checkpoint.tensors.items()], max_bytes),
        inputs={f.name: file_identity(f) for f in checkpoint.files},
        report_file="report.json",
        side_files={"config.json": b'{"model_type": "test"}', "vocab.json": b'{"a": 1}'},
    )


def write(checkpoint: NewCheckpoint, workers: int = 2) -> Recorder:
    recorder = Recorder()
    with Writer(checkpoint, recorder, workers) as writer:  # type: ignore[arg-type]  # stands in for Run
        if not writer.finished:
            writer.write_shards()
            writer.publish({"seconds": 1})
    return recorder


def is_whole(output: Path, base: Path) -> None:
    """The output is finished, sound, equal to the base, and nothing else is left."""
    assert read_tensors(output) == read_tensors(base)
    report = json.loads((output / "report.json").read_text())
    assert report["complete"] and report["seconds"] == 1
    shards = {f.name for f in output.glob("*.safetensors")}
    assert shards == set(report["shards"])
    assert {f.name for f in output.iterdir()} == shards | {INDEX_FILE, "report.json", "config.json", "vocab.json"}
    for name, facts in report["shards"].items():
        assert files.sha256_file(output / name) == facts["sha256"]
    assert not output.with_name(output.name + ".partial").exists()
