"""What a checkpoint folder really holds: dtypes, shapes, completeness, from the headers alone (no torch, no weights).

`--deep` also reads every weight and looks for NaN and infinity; `--fix` writes a BF16 copy.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from surgvqa.checkpoint.folder import (
    FLOAT_DTYPES,
    Checkpoint,
    TensorInfo,
    flat_config,
    open_checkpoint,
    quantisation,
    usable_cores,
)
from surgvqa.config.options import AuditOptions, Workspace
from surgvqa.errors import UsageError
from surgvqa.outcome import Outcome

FIX_REPORT_FILE = "bf16_copy_report.json"
SHOWN = 20  # lines of each list on the terminal; --json has all
Shape = tuple[int, ...]


def run(options: AuditOptions, workspace: Workspace) -> Outcome:
    """Audits; exit 1 when a tensor is not BF16, anything is wrong, or --deep finds a NaN or an infinity."""
    checkpoint = open_checkpoint(options.checkpoint)
    data = audit(checkpoint)
    if options.deep:
        data["not_finite"] = scan(checkpoint)
        data["problems"] += [f"{e['name']}: {e['nan']} NaN, {e['inf']} infinite" for e in data["not_finite"]]
        data["ok"] = data["ok"] and not data["not_finite"]
    if options.fix:
        data["fixed"] = write_bf16_copy(checkpoint, Path(options.fix))
    return Outcome(
        data, ok=data["fixed"]["ok"] if options.fix else data["ok"], show=lambda console: show(console, data)
    )


def audit(checkpoint: Checkpoint) -> dict[str, Any]:
    """`ok`, `tensors`, `parameters`, `bytes`, `dtypes`, `offenders`, `problems`, `architecture`, `missing`, `extra`."""
    tensors = checkpoint.tensors
    offenders = [
        {"name": name, "dtype": t.dtype, "shape": list(t.shape), "shard": t.file.name}
        for name, t in tensors.items()
        if t.dtype != "BF16"
    ]
    problems = list(checkpoint.problems)
    quantised = quantisation(checkpoint)
    if quantised:
        problems.append(f"{checkpoint.folder}: {quantised}")
    expected = expected_tensors(checkpoint)
    problems += compare(expected, tensors)
    return {
        "checkpoint": str(checkpoint.folder),
        "ok": not offenders and not problems,
        "tensors": len(tensors),
        "parameters": sum(t.numel for t in tensors.values()),
        "bytes": checkpoint.nbytes,
        "shards": len(checkpoint.files),
        "dtypes": dict(Counter(t.dtype for t in tensors.values()).most_common()),
        "offenders": offenders,
        "problems": problems,
        "architecture": "audio-grafted Qwen2-VL" if expected else None,
        "missing": sorted(expected.keys() - tensors.keys()),
        "extra": sorted(tensors.keys() - expected.keys()) if expected else [],
    }


# --- the architecture ------------------------------------------------------------------------------------------------


def expected_tensors(checkpoint: Checkpoint) -> dict[str, Shape]:
    """{old name: shape} of the audio-grafted Qwen2-VL that config.json describes; {} for another architecture.

    The audio encoder's sizes are not in an old config.json: its width and depth are read off its own headers.
    """
    config = flat_config(checkpoint.config)
    if config.get("model_type") != "qwen2_vl":
        return {}
    try:
        language = _language_tensors(config)
        vision = _vision_tensors(config)
    except (KeyError, TypeError, ZeroDivisionError):
        return {}
    if config.get("tie_word_embeddings") and "lm_head.weight" not in checkpoint.tensors:
        del language["lm_head.weight"]
    audio = _audio_tensors(config, checkpoint.tensors)
    return {**language, **vision, **audio}


def _language_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width = hidden // heads * config["num_key_value_heads"]
    found: dict[str, Shape] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for projection, out in (("q_proj", hidden), ("k_proj", width), ("v_proj", width)):
            found[f"{layer}self_attn.{projection}.weight"] = (out, hidden)
            found[f"{layer}self_attn.{projection}.bias"] = (out,)
        found[f"{layer}self_attn.o_proj.weight"] = (hidden, hidden)
        found[f"{layer}mlp.gate_proj.weight"] = found[f"{layer}mlp.up_proj.weight"] = (inner, hidden)
        found[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        found[f"{layer}input_layernorm.weight"] = found[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    return found


def _vision_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    vision = {  # Qwen2VLVisionConfig's defaults
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2, **(config.get("vision_config") or {}),
    }  # fmt: skip
    width, patch = vision["embed_dim"], vision["patch_size"]
    inner = int(width * vision["mlp_ratio"])
    merged = width * vision["spatial_merge_size"] ** 2
    found: dict[str, Shape] = {
        "visual.patch_embed.proj.weight": (width, vision["in_channels"], vision["temporal_patch_size"], patch, patch)
    }

    def linear(name: str, out: int, size: int) -> None:
        found[f"visual.{name}.weight"], found[f"visual.{name}.bias"] = (out, size), (out,)

    def norm(name: str) -> None:
        found[f"visual.{name}.weight"] = found[f"visual.{name}.bias"] = (width,)

    for i in range(vision["depth"]):
        norm(f"blocks.{i}.norm1")
        norm(f"blocks.{i}.norm2")
        linear(f"blocks.{i}.attn.qkv", 3 * width, width)
        linear(f"blocks.{i}.attn.proj", width, width)
        linear(f"blocks.{i}.mlp.fc1", inner, width)
        linear(f"blocks.{i}.mlp.fc2", width, inner)
    norm("merger.ln_q")
    linear("merger.mlp.0", merged, merged)
    linear("merger.mlp.2", config["hidden_size"], merged)
    return found


def _audio_tensors(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Shape]:
    """Whisper's encoder and the projector. Sizes from config.json where it has them, else from the tensors."""
    held = {n: t.shape for n, t in tensors.items() if n.startswith(("audio_encoder.", "audio_projector."))}
    if not held and not config.get("use_audio_encoder"):
        return {}
    sizes = config.get("audio_encoder_config") or {}
    known_conv1 = held.get("audio_encoder.conv1.weight", (0, 128, 3))
    width = sizes.get("d_model") or config.get("audio_hidden_size") or known_conv1[0]
    mels = sizes.get("num_mel_bins") or known_conv1[1]
    positions = sizes.get("max_source_positions") or held.get("audio_encoder.embed_positions.weight", (1500,))[0]
    inner = sizes.get("encoder_ffn_dim") or next(
        (shape[0] for name, shape in held.items() if name.endswith(".fc1.weight") and shape), 4 * width
    )
    layers = [int(m[1]) for name in held if (m := re.match(r"audio_encoder\.layers\.(\d+)\.", name))]
    found: dict[str, Shape] = {
        "conv1.weight": (width, mels, 3),
        "conv1.bias": (width,),
        "conv2.weight": (width, width, 3),
        "conv2.bias": (width,),
        "embed_positions.weight": (positions, width),
        "layer_norm.weight": (width,),
        "layer_norm.bias": (width,),
    }
    for i in range(sizes.get("encoder_layers") or max(layers, default=0) + 1):
        layer = f"layers.{i}."
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found[f"{layer}self_attn.{projection}.weight"] = (width, width)
            if projection != "k_proj":  # Whisper's keys have no bias
                found[f"{layer}self_attn.{projection}.bias"] = (width,)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            found[f"{layer}{norm}.weight"] = found[f"{layer}{norm}.bias"] = (width,)
        found[f"{layer}fc1.weight"], found[f"{layer}fc1.bias"] = (inner, width), (inner,)
        found[f"{layer}fc2.weight"], found[f"{layer}fc2.bias"] = (width, inner), (width,)
    found = {f"audio_encoder.{name}": shape for name, shape in found.items()}
    found["audio_projector.weight"] = (config["hidden_size"], width)
    if "audio_projector.bias" in held:
        found["audio_projector.bias"] = (config["hidden_size"],)
    return found


def compare(expected: Mapping[str, Shape], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Missing, extra and wrongly shaped tensors, a line each; nothing when there is nothing to compare with."""
    if not expected:
        return []
    lines = [
        f"{name}: missing, config.json calls for {list(shape)}"
        for name, shape in expected.items()
        if name not in tensors
    ]
    lines += [f"{name}: not a tensor of this architecture" for name in tensors if name not in expected]
    lines += [
        f"{name}: is {list(tensors[name].shape)}, config.json calls for {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return lines


# --- reading the weights ---------------------------------------------------------------------------------------------


def scan(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """[{name, nan, inf, shard}] of every float tensor with a value that is not finite; streams, with progress."""
    import torch

    from surgvqa.checkpoint.shards import BLOCK_BYTES, Files
    from surgvqa.merge.arithmetic import DTYPES

    floats = {n: t for n, t in checkpoint.tensors.items() if t.dtype in FLOAT_DTYPES}
    blocks = [
        (name, start, min(BLOCK_BYTES, t.nbytes - start))
        for name, t in floats.items()
        for start in range(0, t.nbytes, BLOCK_BYTES)
    ]
    files, threads = Files(), torch.get_num_threads()

    def count(block: tuple[str, int, int]) -> tuple[str, int, int, int]:
        name, start, length = block
        raw = bytearray(length)
        files.read_into(floats[name], start, memoryview(raw))
        value = torch.frombuffer(raw, dtype=DTYPES[floats[name].dtype])
        if value.dtype.itemsize == 1:
            value = value.float()
        if torch.isfinite(value).all():
            return name, length, 0, 0
        return name, length, int(torch.isnan(value).sum()), int(torch.isinf(value).sum())

    nan: Counter[str] = Counter()
    inf: Counter[str] = Counter()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(usable_cores()) as pool, _Terminal() as terminal:
            done, total = 0, sum(length for *_, length in blocks)
            terminal.phase("scan", f"{total / 1e9:.2f} GB for NaN and infinity")
            # A window at a time: map() would read everything ahead.
            for window in _windows(blocks, 64):
                for name, length, n, i in pool.map(count, window):
                    nan[name] += n
                    inf[name] += i
                    done += length
                    terminal.progress("scan", done, total, "bytes")
    finally:
        torch.set_num_threads(threads)
        files.close()
    bad = [n for n in floats if nan[n] or inf[n]]
    return [{"name": n, "nan": nan[n], "inf": inf[n], "shard": floats[n].file.name} for n in bad]


def _windows(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


class _Terminal:
    """What Run is to a job, for this command without a run folder: its events are only drawn."""

    def __init__(self) -> None:
        from surgvqa.terminal.job_view import JobView

        self.view = JobView()
        self.last = 0.0

    def __enter__(self) -> _Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.view.close()

    def emit(self, kind: str, **fields: Any) -> None:
        self.view.show({"kind": kind, **fields})

    def phase(self, name: str, text: str = "") -> None:
        self.emit("phase", name=name, text=text)

    def warning(self, text: str) -> None:
        self.emit("warning", text=text)

    def progress(self, phase: str, done: float, total: float | None, unit: str, **fields: Any) -> None:
        now = time.monotonic()
        if now - self.last > 0.2 or done == total:
            self.last = now
            self.emit("progress", phase=phase, done=done, total=total, unit=unit)


# --- a BF16 copy -----------------------------------------------------------------------------------------------------


def write_bf16_copy(checkpoint: Checkpoint, output: Path) -> dict[str, Any]:
    """Writes every float tensor as BF16 to `output`, streamed and resumable as a merge is.

    UsageError for a checkpoint that is damaged, incomplete in its index or quantised: rounding cannot mend that.
    """
    from surgvqa.checkpoint.shards import Copy, Files, plan_shards
    from surgvqa.checkpoint.writer import Job, Writer, file_identity
    from surgvqa.merge.arithmetic import Cast
    from surgvqa.merge.command import output_config, side_files

    quantised = quantisation(checkpoint)
    if quantised:
        raise UsageError(f"{checkpoint.folder}: {quantised}; a BF16 copy of it is not the original")
    checkpoint.require_sound()
    if output.resolve() == checkpoint.folder.resolve():
        raise UsageError(f"--fix {output}: is the checkpoint itself; name another folder")
    files = Files()
    sources = [
        Cast(name, t, files) if t.dtype in FLOAT_DTYPES and t.dtype != "BF16" else Copy(name, t, files)
        for name, t in checkpoint.tensors.items()
    ]
    job = Job(
        output=output,
        shards=plan_shards(sources, 5 * 10**9),
        inputs={f.name: file_identity(f) for f in [*checkpoint.files, checkpoint.folder / "config.json"]},
        report_file=FIX_REPORT_FILE,
        side_files=side_files(checkpoint, output_config(checkpoint)),
    )
    try:
        with _Terminal() as terminal, Writer(job, terminal) as writer:
            if not writer.finished:
                terminal.phase("merge", f"{len(job.shards)} shards, {job.nbytes / 1e9:.2f} GB")
                writer.write_shards()
                writer.publish({"dtypes_before": dict(Counter(t.dtype for t in checkpoint.tensors.values()))})
    finally:
        files.close()
    return audit(open_checkpoint(output))


# --- for people ------------------------------------------------------------------------------------------------------


def show(console: Any, data: dict[str, Any]) -> None:
    """A few lines: what it is, the dtypes, then everything that is wrong."""
    from rich.text import Text

    from surgvqa.terminal.job_view import counted, human_bytes

    console.print(
        f"{data['checkpoint']}: {counted(data['tensors'], 'tensor')}, {data['parameters'] / 1e9:.3f} B parameters, "
        f"{human_bytes(data['bytes'])} in {counted(data['shards'], 'shard')}"
        + ("" if data["architecture"] else " (no audio-grafted Qwen2-VL: completeness not checked)")
    )
    for dtype, count in data["dtypes"].items():
        colour = "green" if dtype == "BF16" else "red"
        console.print(Text.assemble("  ", (f"{dtype:<8}", colour), f" {counted(count, 'tensor')}"))
    for entry in data["offenders"][:SHOWN]:
        text = f"  not BF16: {entry['name']}  {entry['dtype']}  {entry['shape']}  {entry['shard']}"
        console.print(text, style="red", markup=False)
    for text in data["problems"][:SHOWN]:
        console.print(f"  problem: {text}", style="red", markup=False)
    more = max(0, len(data["offenders"]) - SHOWN) + max(0, len(data["problems"]) - SHOWN)
    if more:
        console.print(f"  … and {more} more (--json lists all)")
    if data["ok"]:
        finite = " and finite" if "not_finite" in data else ""
        console.print(Text.assemble(("ok", "green"), f": every tensor is BF16{finite}"))
    if "fixed" in data:
        console.print(f"BF16 copy: {data['fixed']['checkpoint']}: {'ok' if data['fixed']['ok'] else 'not ok'}")
        for text in data["fixed"]["problems"][:SHOWN]:
            console.print(f"  problem: {text}", style="red", markup=False)
