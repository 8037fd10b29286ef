"""Headers, index and names; and the writer through every way of dying."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_kit import read_tensors, write_file, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from waiting import until

from surgvqa import files
from surgvqa.checkpoint import shard_writer, writer
from surgvqa.checkpoint.config_json import flat_config, quantisation, whisper_config
from surgvqa.checkpoint.folder import open_checkpoint, parse_size
from surgvqa.checkpoint.headers import TensorInfo, header_bytes, read_header
from surgvqa.checkpoint.names import INDEX_FILE, to_old_name
from surgvqa.checkpoint.shards import Copy, Files, plan_shards, split_rows, tensor_bytes
from surgvqa.checkpoint.writer import MANIFEST_FILE, Job, Writer, file_identity
from surgvqa.errors import SurgvqaError, UsageError

SHARDS = [{f"layer.{k}.{i}": ("BF16", (30, 7 + i)) for i in range(4)} for k in range(5)]
PAGES = [{f"layer.{k}.{i}": ("BF16", (30, 3 + 70 * i)) for i in range(4)} for k in range(5)]
"""Shards of several pages each; no tensor ends with a page."""


# --- headers and folders ---------------------------------------------------------------------------------------------


def test_header_round_trip(tmp_path: Path) -> None:
    spec = {"a": ("BF16", (2, 3)), "b": ("F32", ()), "c": ("I64", (0, 4)), "d": ("U8", (5,))}
    content = write_file(tmp_path / "x.safetensors", spec)
    tensors, problems = read_header(tmp_path / "x.safetensors")
    assert problems == []
    assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == spec
    whole = (tmp_path / "x.safetensors").read_bytes()
    assert {n: whole[t.offset : t.offset + t.nbytes] for n, t in tensors.items()} == content


def raw_file(file: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(begin: int, end: int, dtype: str = "BF16", shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "size", "text"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "b: overlaps the data of a"),
        ({"a": entry(0, 4), "b": entry(6, 10)}, 10, "2 bytes that belong to no tensor before b"),
        ({"a": entry(0, 4)}, 3, "a: truncated: data ends at byte"),
        ({"a": entry(0, 4)}, 9, "5 bytes after the last tensor"),
        ({"a": entry(0, 4, shape=(3,))}, 4, "a: 4 bytes, but BF16 [3] needs 6"),
        ({"a": entry(0, 4, dtype="Q4")}, 4, "a: unknown dtype Q4"),
        ({"a": entry(0, 4, shape=(-2,))}, 4, "damaged header"),
        ({"a": {"dtype": "BF16"}}, 4, "damaged header"),
        (b"{not json", 4, "damaged header"),
        (b"[1]", 4, "damaged header"),
    ],
)
def test_damage_is_named(tmp_path: Path, header: Any, size: int, text: str) -> None:
    _, problems = read_header(raw_file(tmp_path / "x.safetensors", header, b"\0" * size))
    assert any(text in p and "x.safetensors" in p for p in problems), problems


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_problem_not_a_crash(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "random.safetensors"
    file.write_bytes(content)
    tensors, problems = read_header(file)
    assert problems or not tensors


def test_index_against_shards(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", SHARDS)
    assert open_checkpoint(tmp_path / "c").problems == []
    index = json.loads((tmp_path / "c" / INDEX_FILE).read_text())
    names = list(index["weight_map"])
    index["weight_map"][names[0]] = index["weight_map"][names[-1]]
    index["weight_map"]["ghost"] = index["weight_map"][names[-1]]
    del index["weight_map"][names[5]]
    (tmp_path / "c" / INDEX_FILE).write_text(json.dumps(index))
    write_file(tmp_path / "c" / "stray.safetensors", {"s": ("BF16", (1,))})
    problems = "\n".join(open_checkpoint(tmp_path / "c").problems)
    assert f"{names[0]}: {INDEX_FILE} says {index['weight_map'][names[0]]}" in problems
    assert f"ghost: in {INDEX_FILE}, but not in the file" in problems
    assert f"{names[5]}: not in {INDEX_FILE}" in problems
    assert "stray.safetensors: not named in" in problems
    assert len(problems.splitlines()) == 4, problems
    (tmp_path / "c" / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(UsageError, match="and 3 more"):
        open_checkpoint(tmp_path / "c").require_sound()


def test_duplicates_and_folders_without_index(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", [{"a": ("BF16", (2,))}])
    write_file(tmp_path / "c" / "other.safetensors", {"a": ("BF16", (2,))})
    assert open_checkpoint(tmp_path / "c").problems == []  # model.safetensors is the checkpoint
    (tmp_path / "c" / "model.safetensors").rename(tmp_path / "c" / "part.safetensors")
    problems = "\n".join(open_checkpoint(tmp_path / "c").problems)
    assert "2 shards and no" in problems and "also in other.safetensors" in problems
    for content, text in (("adapter_config.json", "this is an adapter"), ("x.bin", r"only \.bin weights")):
        (tmp_path / content).mkdir()
        (tmp_path / content / content).write_text("{}")
        with pytest.raises(UsageError, match=text):
            open_checkpoint(tmp_path / content)
    with pytest.raises(UsageError, match="no such checkpoint folder"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "c" / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../../etc/x"}}))
    with pytest.raises(UsageError, match="is no plain file name"):
        open_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.visual.blocks.0.norm1.bias", "visual.blocks.0.norm1.bias"),
        ("model.audio_encoder.conv1.weight", "audio_encoder.conv1.weight"),
        ("model.audio_projector", "audio_projector"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_old_names(new: str, old: str) -> None:
    assert to_old_name(new) == old == to_old_name(old)


def test_sizes_from_text() -> None:
    assert [parse_size(t) for t in ("5GB", "800mb", "2GiB", "1000", "1.5 KB")] == [
        5 * 10**9, 800 * 10**6, 2 * 2**30, 1000, 1500,
    ]  # fmt: skip
    for text in ("", "GB", "-1GB", "5 apples", "0", "1.2.3GB"):
        with pytest.raises(UsageError, match="expected a size"):
            parse_size(text)


def test_whisper_sizes_are_read_off_the_shapes() -> None:
    def info(name: str, *shape: int) -> TensorInfo:
        return TensorInfo(name, "BF16", shape, Path("x"), 0, 0)

    shapes = {
        "conv1.weight": (1280, 128, 3),
        "embed_positions.weight": (1500, 1280),
        "layers.0.fc1.weight": (5120, 1280),
    }
    tensors = {f"audio_encoder.{n}": info(n, *s) for n, s in shapes.items()}
    tensors |= {f"audio_encoder.layers.{i}.fc2.bias": info("b", 1280) for i in range(32)}
    assert whisper_config(tensors) == {
        "model_type": "whisper", "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120, "num_mel_bins": 128, "max_source_positions": 1500,
    }  # fmt: skip
    assert whisper_config({}) is None


def test_nested_config_becomes_flat() -> None:
    rope = {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [16, 24, 24]}
    nested = {
        "model_type": "qwen2_vl", "dtype": "bfloat16", "vision_config": {"depth": 2},
        "text_config": {"model_type": "qwen2_vl_text", "hidden_size": 8, "rope_parameters": rope},
    }  # fmt: skip
    assert flat_config(nested) == {
        "model_type": "qwen2_vl", "torch_dtype": "bfloat16", "vision_config": {"depth": 2}, "hidden_size": 8,
        "rope_theta": 1e6, "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    assert flat_config(flat_config(nested)) == flat_config(nested)


def test_quantised_checkpoints_are_recognised(tmp_path: Path) -> None:
    marks = {"a.weight.absmax": "4-bit", "a.SCB": "quantised", "a.qweight": "quantised", "a.bias": None}
    for number, (name, word) in enumerate(marks.items()):
        write_folder(tmp_path / str(number), [{name: ("F32", (2,))}])
        said = quantisation(open_checkpoint(tmp_path / str(number)))
        assert (word is None and said is None) or (word in said and (word == "quantised" or name in said))
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    write_folder(tmp_path / "c", [{"a": ("U8", (2,))}], config)
    assert "4-bit" in quantisation(open_checkpoint(tmp_path / "c"))


# --- planning --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 4000), st.integers(1, 100_000))
def test_rows_are_split_near_equally(rows: int, row_bytes: int, block: int) -> None:
    parts = split_rows((rows, 3), row_bytes, block)
    assert [a for a, _ in parts] == [sum(n for _, n in parts[:i]) for i in range(len(parts))]
    assert sum(n for _, n in parts) == rows
    sizes = {n for _, n in parts}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) * row_bytes <= max(block + row_bytes, row_bytes)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["BF16", "F32", "I64", "U8"]), st.integers(0, 50)), min_size=1),
    st.integers(1, 300),
)
def test_shards_hold_everything_once_in_order(tensors: list[tuple[str, int]], most: int) -> None:
    files = Files()
    sources = [
        Copy(f"t{i}", TensorInfo(f"t{i}", dtype, (n,), Path("x"), 0, n), files) for i, (dtype, n) in enumerate(tensors)
    ]
    shards = plan_shards(sources, most)
    assert sorted((s.name for shard in shards for s in shard.sources), key=lambda n: int(n[1:])) == [
        s.name for s in sources
    ]
    for shard in shards:
        size = shard.nbytes - len(shard.head)
        assert size <= most or len([s for s in shard.sources if tensor_bytes(s)]) == 1
        assert len(shard.head) % 8 == 0
    names = [s.file for s in shards]
    assert names == sorted(names) and len(set(names)) == len(names)


# --- the writer ------------------------------------------------------------------------------------------------------


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


def make_job(base: Path, output: Path, max_bytes: int = 2000) -> Job:
    checkpoint, files = open_checkpoint(base), Files()
    return Job(
        output=output,
        shards=plan_shards([Copy(n, t, files) for n, t in checkpoint.tensors.items()], max_bytes),
        inputs={f.name: file_identity(f) for f in checkpoint.files},
        report_file="report.json",
        side_files={"config.json": b'{"model_type": "test"}', "vocab.json": b'{"a": 1}'},
    )


def write(job: Job, workers: int = 2) -> Recorder:
    recorder = Recorder()
    with Writer(job, recorder, workers) as writer:  # type: ignore[arg-type]  # a stand-in
        if not writer.finished:
            writer.write_shards()
            writer.publish({"seconds": 1})
    return recorder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_folder(tmp_path / "base", SHARDS)
    return tmp_path / "base"


@pytest.fixture(params=[(SHARDS, 2000), (PAGES, 30_000)], ids=["bytes", "pages"])
def sized(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, int]:
    """A base and the shard size for it; one with shards below a page, one with pages and several blocks a tensor."""
    shards, most = request.param
    write_folder(tmp_path / "base", shards)
    monkeypatch.setattr("surgvqa.checkpoint.shards.BLOCK_BYTES", 5000)
    return tmp_path / "base", most


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


def test_written_checkpoint_is_read_by_the_safetensors_library(tmp_path: Path, base: Path) -> None:
    recorder = write(make_job(base, tmp_path / "out"))
    is_whole(tmp_path / "out", base)
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(len(b) for b in read_tensors(base).values())
    last = recorder.of("progress")[-1]
    assert last["done"] == last["total"] and last["shard_done"] == last["shard_total"]
    assert [e["done"] for e in recorder.of("shard")] == list(range(1, len(recorder.of("shard")) + 1))
    deserialize = pytest.importorskip("safetensors").deserialize
    for file in (tmp_path / "out").glob("*.safetensors"):
        found = {n: bytes(t["data"]) for n, t in deserialize(file.read_bytes())}
        assert found.items() <= read_tensors(base).items()


@pytest.mark.parametrize("refused", [None, "when set", "when written"])
def test_past_the_page_cache_or_not_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str | None
) -> None:
    write_folder(tmp_path / "base", PAGES)
    monkeypatch.setattr("surgvqa.checkpoint.shards.BLOCK_BYTES", 5000)
    pwrite, control = os.pwrite, fcntl.fcntl
    direct, cached = [], []

    def is_direct(fd: int) -> bool:
        return bool(control(fd, fcntl.F_GETFL) & os.O_DIRECT)

    def write_some(fd: int, data: memoryview, position: int) -> int:
        if is_direct(fd) and refused == "when written" and position >= 8192:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        (direct if is_direct(fd) else cached).append((position, len(data)))
        return pwrite(fd, data, position)

    def set_flags(fd: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & os.O_DIRECT and refused == "when set":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return control(fd, command, value)

    monkeypatch.setattr(os, "pwrite", write_some)
    monkeypatch.setattr(fcntl, "fcntl", set_flags)
    write(make_job(tmp_path / "base", tmp_path / "out", 30_000))
    monkeypatch.undo()
    is_whole(tmp_path / "out", tmp_path / "base")
    with open(tmp_path / "probe", "wb") as probe, contextlib.suppress(OSError):
        control(probe.fileno(), fcntl.F_SETFL, os.O_WRONLY | os.O_DIRECT)
        assert bool(direct) == (refused != "when set")  # this file system takes O_DIRECT
    if refused is None:
        assert all(position % 4096 == length % 4096 == 0 for position, length in direct)
        assert all(length < 4096 for _, length in cached) or not direct


@pytest.mark.parametrize("workers", [1, 2, 4, 7])
def test_any_number_of_workers_writes_the_same(
    tmp_path: Path, sized: tuple[Path, int], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """From four workers on several shards are made at once; each block takes its own time."""
    fill, chance = Copy.fill, random.Random(workers)

    def at_its_own_pace(self: Copy, start: int, out: memoryview) -> None:
        time.sleep(chance.random() / 500)
        fill(self, start, out)

    monkeypatch.setattr(Copy, "fill", at_its_own_pace)
    base, most = sized
    recorder = write(make_job(base, tmp_path / "out", most), workers)
    is_whole(tmp_path / "out", base)
    done = [e["done"] for e in recorder.of("progress")]
    assert done == sorted(done) and done[-1] == recorder.of("progress")[-1]["total"]
    order = [e["shard"] for e in recorder.of("progress")]
    turns = sum(a != b for a, b in itertools.pairwise(order)) + 1
    shards = len(recorder.of("shard"))
    assert turns == shards if workers < 4 else turns > shards


@pytest.mark.parametrize("workers", [2, 16])
def test_what_is_held_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """However many the workers and however slow the disk; a tensor that is larger than the bound is held alone.

    A worker that may not begin a block prepares what is to come.
    """
    monkeypatch.setattr(shard_writer, "BUFFER_BYTES", 8192)
    monkeypatch.setattr(writer, "MAX_WORKERS", 16)
    room = shard_writer.HELD_BLOCKS * 8192
    small = {f"small.{i}": ("BF16", (30, 40 + i)) for i in range(40)}
    write_folder(tmp_path / "base", [small, {"large": ("BF16", (30, 3000)), **{f"x.{n}": s for n, s in small.items()}}])
    job = make_job(tmp_path / "base", tmp_path / "out", 30 * 6000)
    assert len(job.shards) > 1 and room < 30 * 6000
    begin, pwrite, held, full = shard_writer.ShardWriter._begin, os.pwrite, [], threading.Event()
    prepared: list[str] = []
    monkeypatch.setattr(Copy, "prepare", lambda self: prepared.append(self.name))

    def watched(self: shard_writer.ShardWriter) -> Any:
        block = begin(self)
        if block:
            held.append((self.held, len(block.buffer)))
        elif self.held + 8192 > room:
            full.set()
        return block

    def slow(fd: int, data: memoryview, position: int) -> int:
        assert full.wait(20), "the workers stopped before what they may hold was full"
        return pwrite(fd, data, position)

    monkeypatch.setattr(shard_writer.ShardWriter, "_begin", watched)
    monkeypatch.setattr(os, "pwrite", slow)
    write(job, workers)
    assert all(total <= room or total == block for total, block in held)
    assert max(total for total, _ in held) > room
    assert prepared and len(set(prepared)) == len(prepared)
    monkeypatch.undo()
    is_whole(tmp_path / "out", tmp_path / "base")


def test_one_shard_has_no_index(tmp_path: Path, base: Path) -> None:
    write(make_job(base, tmp_path / "out", 10**9))
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "out" / INDEX_FILE).exists()
    assert read_tensors(tmp_path / "out") == read_tensors(base)


SCRIPT = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from test_writer import Copy, make_job, write
fill = Copy.fill
def slow(self, start, out):
    time.sleep({delay})
    fill(self, start, out)
Copy.fill = slow
print("ready", flush=True)
write(make_job(Path({base!r}), Path({output!r})))
"""


def start(base: Path, output: Path, delay: float) -> subprocess.Popen[str]:
    """The writer in a process of its own, slowed down; returns once it is about to begin."""
    path = [str(Path(__file__).parent), str(ROOT), str(ROOT / "tests/kits")]
    script = textwrap.dedent(SCRIPT).format(path=path, base=str(base), output=str(output), delay=delay)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_kill_9_and_rerun(tmp_path: Path, base: Path, done: int) -> None:
    """Killed once `done` shards are entered in the manifest; the rerun keeps just those."""
    output, partial = tmp_path / "out", tmp_path / "out.partial"

    def entered() -> int:
        try:
            return len(json.loads((partial / MANIFEST_FILE).read_text())["shards"])
        except (OSError, ValueError):
            return -1

    process = start(base, output, 0.05)
    until(lambda: entered() >= done)
    process.kill()
    process.wait()
    assert not output.exists()
    kept = entered()
    recorder = write(make_job(base, output))
    is_whole(output, base)
    assert len(recorder.of("shard")) == len(make_job(base, output).shards) - kept
    assert bool(kept) == any(e["name"] == "resume" for e in recorder.of("phase"))


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, base: Path) -> None:
    process = start(base, tmp_path / "out", 0.05)
    until(lambda: list((tmp_path / "out.partial").glob("*.safetensors")))
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate()[1]
    assert not (tmp_path / "out").exists()
    recorder = write(make_job(base, tmp_path / "out"))
    is_whole(tmp_path / "out", base)
    assert any(e["name"] == "resume" for e in recorder.of("phase"))


def test_two_at_once(tmp_path: Path, base: Path) -> None:
    process = start(base, tmp_path / "out", 0.2)
    try:
        until(lambda: (tmp_path / "out.partial" / MANIFEST_FILE).exists())
        with pytest.raises(SurgvqaError, match="another process is writing it"):
            write(make_job(base, tmp_path / "out"))
    finally:
        process.kill()
        process.wait()
    write(make_job(base, tmp_path / "out"))
    is_whole(tmp_path / "out", base)


@pytest.mark.parametrize("seed", range(12))
def test_full_disk_at_any_byte(
    tmp_path: Path, sized: tuple[Path, int], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    output, (base, most) = tmp_path / "out", sized
    workers = 2 + 2 * (seed % 2)  # with four, two shards are at hand when the disk fills up
    room = random.Random(seed).randrange(sum(len(b) for b in read_tensors(base).values()))
    pwrite = os.pwrite

    def limited(fd: int, data: memoryview, position: int) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = min(room, len(data))
        room -= count
        return pwrite(fd, data[:count], position)

    monkeypatch.setattr(os, "pwrite", limited)
    with pytest.raises(SurgvqaError, match=r"the disk is full; \d+ of \d+ shards are kept in out\.partial: free some"):
        write(make_job(base, output, most), workers)
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert not output.exists()
    write(make_job(base, output, most), workers)
    is_whole(output, base)


def test_truly_full_disk(tmp_path: Path, base: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], capture_output=True).returncode
    )
    if not mounted:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(SurgvqaError, match=r"needs 11\.\d kB, 8\.2 kB are free"):
            write(make_job(base, disk / "out"))
        assert list(disk.iterdir()) == []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "free_bytes", lambda _: 10**9)  # the space went after the check
            with pytest.raises(SurgvqaError, match="the disk is full"):
                write(make_job(base, disk / "out"))
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        write(make_job(base, disk / "out"))
        is_whole(disk / "out", base)
    finally:
        subprocess.run(["umount", disk], check=True)


class Crash(BaseException):
    """The power goes."""


class Disk:
    """A disk that forgets on a crash what was not fsynced: data of files, and names in folders."""

    def __init__(self, patch: pytest.MonkeyPatch, steps: int):
        self.steps = steps
        self.dirty: set[int] = set()  # inodes
        self.renames: list[tuple[Path, Path, bytes | None]] = []
        self.real = {name: getattr(os, name) for name in ("pwrite", "fsync", "fdatasync", "rename", "replace")}
        for name in self.real:
            patch.setattr(os, name, getattr(self, name))

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Crash

    def pwrite(self, fd: int, data: memoryview, position: int) -> int:
        self.step()
        self.dirty.add(os.fstat(fd).st_ino)
        return self.real["pwrite"](fd, data, position)

    def fsync(self, fd: int) -> None:
        self.step()
        self.dirty.discard(os.fstat(fd).st_ino)
        folder = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.isdir(folder):
            self.renames = [r for r in self.renames if str(r[1].parent) != folder]

    fdatasync = fsync

    def rename(self, old: Path, new: Path) -> None:
        self.step()
        old, new = Path(old), Path(new)
        before = new.read_bytes() if new.is_file() else None
        self.real["rename"](old, new)
        self.renames.append((old, new, before))

    replace = rename

    def crash(self, folders: list[Path], chance: random.Random) -> None:
        """Undoes a random part of what is not on the disk yet: the kernel may have written some of it anyway."""
        for old, new, before in reversed(self.renames):
            if chance.random() < 0.5:
                continue
            if new.exists():
                self.real["rename"](new, old)
            if before is not None:
                new.write_bytes(before)
        for file in (f for place in folders if place.is_dir() for f in place.iterdir()):
            if file.stat().st_ino in self.dirty:
                size = file.stat().st_size
                kept = chance.randrange(size + 1)
                with open(file, "r+b") as stream:
                    stream.seek(kept)
                    stream.write(b"\0" * (size - kept))
                    stream.truncate(chance.choice((size, kept)))


@pytest.mark.parametrize("seed", range(25))
def test_power_loss_and_rerun(tmp_path: Path, sized: tuple[Path, int], seed: int) -> None:
    chance = random.Random(seed)
    output, partial, (base, most) = tmp_path / "out", tmp_path / "out.partial", sized
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, chance.randrange(90))
        with contextlib.suppress(Crash):
            write(make_job(base, output, most), workers=1)
        disk.crash([partial, output], chance)
    if output.exists():
        is_whole(output, base)  # the name is only ever given to a whole folder
    write(make_job(base, output, most))
    is_whole(output, base)


def test_a_damaged_shard_is_found_and_written_again(tmp_path: Path, base: Path) -> None:
    write(make_job(base, tmp_path / "out"))
    victim = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    content = bytearray(victim.read_bytes())
    content[-3] ^= 1
    victim.write_bytes(content)
    recorder = write(make_job(base, tmp_path / "out"))
    assert [e["file"] for e in recorder.of("shard")] == [victim.name]
    assert "its content is not what was written" in recorder.of("warning")[0]["text"]
    is_whole(tmp_path / "out", base)


def test_other_inputs_start_again_and_say_so(tmp_path: Path, base: Path) -> None:
    process = start(base, tmp_path / "out", 0.05)
    until(lambda: list((tmp_path / "out.partial").glob("*.safetensors")))
    process.kill()
    process.wait()
    write_folder(base, [{n: (d, (s[0], s[1] + 1)) for n, (d, s) in shard.items()} for shard in SHARDS])
    recorder = write(make_job(base, tmp_path / "out"))
    assert "made from other inputs" in recorder.of("warning")[0]["text"]
    assert "starting again" in recorder.of("warning")[0]["text"]
    is_whole(tmp_path / "out", base)


def test_what_others_made_is_never_touched(tmp_path: Path, base: Path) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    for place in (output, partial):
        place.mkdir()
        (place / "thesis.tex").write_text("years of work")
        with pytest.raises(SurgvqaError, match="move it away"):
            write(make_job(base, output))
        assert (place / "thesis.tex").read_text() == "years of work"
        shutil.rmtree(place)
    assert not partial.exists()
    process = start(base, output, 0.05)
    until(lambda: (partial / MANIFEST_FILE).exists())
    process.kill()
    process.wait()
    (partial / "thesis.tex").write_text("years of work")
    with pytest.raises(SurgvqaError, match=r"thesis\.tex was not written by this command"):
        write(make_job(base, output))
    assert (partial / "thesis.tex").exists()
    output.write_text("a file")
    (partial / "thesis.tex").unlink()
    with pytest.raises(SurgvqaError, match="is a file"):
        write(make_job(base, output))
    assert output.read_text() == "a file"


def test_empty_output_folder_is_taken(tmp_path: Path, base: Path) -> None:
    (tmp_path / "out").mkdir()
    write(make_job(base, tmp_path / "out"))
    is_whole(tmp_path / "out", base)


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link_is_written_where_it_leads(tmp_path: Path, base: Path, there: bool) -> None:
    """To another disk, mostly: nothing of it may land beside the link, and the link stays."""
    large = tmp_path / "large disk" / "out"
    large.parent.mkdir()
    if there:
        large.mkdir()
    (tmp_path / "small").mkdir()
    link = tmp_path / "small" / "merged"
    link.symlink_to(large)
    write(make_job(base, link))
    is_whole(large, base)
    assert link.is_symlink() and [f.name for f in link.parent.iterdir()] == ["merged"]


def test_disk_is_checked_first(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "free_bytes", lambda _: 5_000)
    job = make_job(base, tmp_path / "deep" / "er" / "out")
    text = r"needs 1\d\.\d kB, 5\.0 kB are free; free some or name a folder on another"
    with pytest.raises(SurgvqaError, match=text):
        write(job)
    assert list((tmp_path / "deep" / "er").iterdir()) == []


def test_base_that_changes_under_the_merge_is_an_error(tmp_path: Path, base: Path) -> None:
    job = make_job(base, tmp_path / "out")
    file = base / "model-00003-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(SurgvqaError, match="the file changed while it was read"):
        write(job)
    assert not (tmp_path / "out").exists()


def test_header_bytes_are_aligned() -> None:
    for length in range(20):
        head = header_bytes([("n" * length, "BF16", (1,), 2)])
        assert len(head) % 8 == 0 and int.from_bytes(head[:8], "little") == len(head) - 8


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    files.write_json_atomic(tmp_path / "x.json", {"a": 1})
    assert [f.name for f in tmp_path.iterdir()] == ["x.json"]


def test_death_before_the_first_manifest_leaves_nothing_in_the_way(tmp_path: Path, base: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / f".{MANIFEST_FILE}.4711.tmp").write_text('{"made_by"')
    write(make_job(base, tmp_path / "out"))
    is_whole(tmp_path / "out", base)
