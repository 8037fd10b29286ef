"""Compares the merge with `cp -r` and PEFT on a synthetic checkpoint, in interleaved rounds. Prints a table with
ratios.

    python benchmarks/merge.py                          # 3 GB base, r=64 on all seven projections; cp, ours, PEFT
    python benchmarks/merge.py --size 15GB --methods cp,ours --repeats 1     # peak memory on a large checkpoint
    python benchmarks/merge.py --device cuda --size 3GB --repeats 3     # ours on CPU and GPU; bits equal to PEFT's?

Everything is written to a temporary folder (under --dir), about 3× the base's size, and deleted at the end. The
weights repeat one random block, and the bytes are really read and written. Times are in-process (without interpreter
start and imports); "process" is the whole process. Peak RSS is that of the whole process; "of it imports" is the part
before the merge: torch itself and the CUDA context. Ours ends with everything fsynced. `cp` does not; `cp + fsync`
does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIZES = {  # language models of Qwen2's shape; the 15 GB one is the real model's
    "small": {"hidden": 256, "inner": 704, "layers": 4, "vocab": 4096, "heads": 4, "kv": 2, "tied": False},
    "3GB": {"hidden": 1536, "inner": 8960, "layers": 28, "vocab": 151936, "heads": 12, "kv": 2, "tied": True},
    "15GB": {"hidden": 3584, "inner": 18944, "layers": 28, "vocab": 152064, "heads": 28, "kv": 4, "tied": False},
}
RANK = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3GB", choices=SIZES)
    parser.add_argument("--methods", default=None, help="comma-separated: cp,cp+fsync,ours,ours-cuda,peft,peft-cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="unmeasured rounds first")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--max_shard_size", default="5GB")
    parser.add_argument("--dir", default=None, help="parent of the temporary folder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", default=None, help="also write the output of --json to this file")
    parser.add_argument("--child", nargs=4, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(*arguments.child, arguments.max_shard_size)
    on_gpu = arguments.device == "cuda"
    default = "cp,ours,ours-cuda,peft,peft-cuda" if on_gpu else "cp,cp+fsync,ours,peft"
    methods = (arguments.methods or default).split(",")
    once_only = {"peft", "peft-cuda"} if on_gpu else set()  # only needed for comparing bits; GPU time is expensive
    with tempfile.TemporaryDirectory(prefix="surgvqa-merge-", dir=arguments.dir) as folder:
        result = measure(Path(folder), arguments.size, methods, once_only, arguments)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=1))
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print_table(result)
    # A GPU may add a product's terms in another order, which is reported but is not a failure.
    must = [c for c in result["compared"] if not any("cuda" in method for method in c["of"])]
    return 0 if all(c["equal"] for c in must) else 1


# --- the synthetic checkpoint ----------------------------------------------------------------------------------------


def make_inputs(folder: Path, size: str) -> tuple[Path, Path, int]:
    """Writes a base checkpoint in shards of at most 1 GB and an adapter for it. Returns both and the base's bytes."""
    import torch
    from safetensors.torch import save_file

    from surgvqa.config.options import LORA_TARGETS

    s = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(1 << 24, generator=generator) * 0.02).to(torch.bfloat16)

    def weight(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return block.repeat(-(-count // block.numel()))[:count].view(shape)

    hidden, inner, kv = s["hidden"], s["inner"], s["hidden"] // s["heads"] * s["kv"]
    projections = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (s["vocab"], hidden)}
    for i in range(s["layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{name}.weight": shape for name, shape in projections.items()}
        shapes |= {f"{layer}self_attn.{p}_proj.bias": (n,) for p, n in (("q", hidden), ("k", kv), ("v", kv))}
        shapes |= {f"{layer}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (hidden,)
    if not s["tied"]:
        shapes["lm_head.weight"] = (s["vocab"], hidden)

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if groups[-1] and filled + nbytes > 10**9:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: weight(*shapes[name]).clone() for name in group}, base / file, {"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"], "num_key_value_heads": s["kv"],
        "vocab_size": s["vocab"], "tie_word_embeddings": s["tied"], "torch_dtype": "bfloat16",
        "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))

    lora = {}
    for i in range(s["layers"]):
        for name, (out, inputs) in projections.items():
            prefix = f"base_model.model.model.layers.{i}.{name}"
            lora[f"{prefix}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) * inputs**-0.5
            lora[f"{prefix}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.01
    save_file(lora, adapter / "adapter_model.safetensors", {"format": "pt"})
    adapter_config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16, "lora_dropout": 0.05,
        "target_modules": LORA_TARGETS, "bias": "none", "base_model_name_or_path": str(base), "inference_mode": True,
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(adapter_config))
    return base, adapter, total


# --- one measurement, in a process of its own ------------------------------------------------------------------------


def child(method: str, base: str, adapter: str, output: str, max_shard_size: str) -> int:
    """Merges once and prints time and memory as JSON."""
    import torch

    if method.startswith("peft"):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
    else:
        from surgvqa.config.options import MergeOptions
        from surgvqa.config.settings import Path_
        from surgvqa.merge import command
        from surgvqa.runs.folder import Run
    if method.endswith("-cuda"):
        torch.zeros(1, device="cuda")  # creates the context, which is part of starting up
    imports = resident("VmRSS")
    before, began = time.process_time(), time.perf_counter()
    told: dict[str, Any] = {}
    if method.startswith("peft"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        model = model.to("cuda" if method == "peft-cuda" else "cpu")
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload().to(torch.bfloat16)
        model.save_pretrained(output, max_shard_size=max_shard_size)
    else:
        options = MergeOptions(
            stage1_model_path=Path_(base),
            stage2_adapter_path=Path_(adapter),
            output_path=Path_(output),
            max_shard_size=max_shard_size,
            device="cuda" if method == "ours-cuda" else "cpu",
        )
        with Run.create(Path(output).parent / "runs", "merge") as run:
            command.run(options, run)
        told = json.loads((Path(output) / "merge_report.json").read_text())["seconds_by_phase"]
    seconds, cpu = time.perf_counter() - began, time.process_time() - before
    memory = {"peak_rss": resident("VmHWM"), "imports_rss": imports}
    print(json.dumps({"seconds": seconds, "cpu": cpu, **memory, "phases": told}))
    return 0


def resident(which: str) -> int:
    """Resident bytes now (VmRSS) or at most since exec (VmHWM; ru_maxrss would include the parent's)."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{which}:")[1].split()[0]) * 1024


def copy(base: Path, output: Path, fsync: bool) -> dict[str, Any]:
    """Runs `cp -r` and, if `fsync`, syncs the files."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", base, output], check=True)
    for file in output.iterdir() if fsync else []:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "process": seconds, "cpu": cpu, "peak_rss": None, "imports_rss": None}


def once(method: str, base: Path, adapter: Path, output: Path, max_shard_size: str) -> dict[str, Any]:
    """Runs a method once, into `output`."""
    if method in ("cp", "cp+fsync"):
        return copy(base, output, method == "cp+fsync")
    command = [sys.executable, str(Path(__file__).resolve()), "--max_shard_size", max_shard_size, "--child", method]
    began = time.perf_counter()
    done = subprocess.run([*command, base, adapter, output], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-3000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "process": time.perf_counter() - began}


def measure(
    folder: Path, size: str, methods: list[str], once_only: set[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Runs all methods in turn in each round, after an unmeasured one. Methods of `once_only` run only in the last."""
    repeats, warmup, max_shard_size = arguments.repeats, arguments.warmup, arguments.max_shard_size
    base, adapter, total = make_inputs(folder, size)
    rows: dict[str, list[dict[str, Any]]] = {m: [] for m in methods}
    for number in range(1 - warmup, repeats + 1):
        outputs = {}
        last = number == repeats
        for method in methods if last else [m for m in methods if m not in once_only]:
            for file in (*base.iterdir(), *adapter.iterdir()):
                warm(file)
            output = folder / f"out-{method}"
            copy(
                base, output, fsync=False
            )  # unmeasured; afterwards a virtual machine has its free memory, for every method
            shutil.rmtree(output)
            load = os.getloadavg()[0]
            row = once(method, base, adapter, output, max_shard_size)
            if number > 0:
                rows[method].append({**row, "load": load})
            if last and method not in ("cp", "cp+fsync"):
                outputs[method] = output
            else:
                shutil.rmtree(output)
            os.sync()
            print(f"round {number} {method}: {row['seconds']:.2f} s, load {load:.1f}", file=sys.stderr)
    pairs = [("ours", "peft"), ("ours", "ours-cuda"), ("ours-cuda", "peft-cuda")]
    compared = [compare(*pair, outputs) for pair in pairs if outputs.keys() >= set(pair)]
    return {
        "size": size,
        "base_bytes": total,
        "repeats": repeats,
        "max_shard_size": max_shard_size,
        "machine": machine(),
        "rows": rows,
        "compared": compared,
    }


def warm(file: Path) -> None:
    """Reads a file into the page cache."""
    buffer = bytearray(1 << 23)
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def compare(one: str, other: str, outputs: dict[str, Path]) -> dict[str, Any]:
    """Compares outputs bit by bit: the number of differing elements, and their largest difference in bf16 steps."""
    import torch
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, Path]:
        found = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as stream:
                found |= dict.fromkeys(stream.keys(), file)
        return found

    left, right = tensors(outputs[one]), tensors(outputs[other])
    differing, elements, steps = 0, 0, 0
    for name in left.keys() & right.keys():
        with safe_open(left[name], "pt") as a, safe_open(right[name], "pt") as b:
            x, y = a.get_tensor(name), b.get_tensor(name)
        elements += x.numel()
        if not torch.equal(x.view(torch.int16), y.view(torch.int16)):
            gap = (x.view(torch.int16).int() - y.view(torch.int16).int()).abs()
            differing += int((gap > 0).sum())
            steps = max(steps, int(gap.max()))
    same_names = left.keys() == right.keys()
    return {
        "of": [one, other],
        "tensors": len(left),
        "same_names": same_names,
        "elements": elements,
        "differing_elements": differing,
        "most_bf16_steps": steps,
        "equal": same_names and not differing,
    }


def machine() -> dict[str, Any]:
    """The machine and versions of the measurement."""
    import peft
    import torch
    import transformers

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "kernel": platform.release(),
    }


def print_table(result: dict[str, Any]) -> None:
    """Prints a Markdown table of medians, and of the median of the ratios within each round."""
    rows, machine_ = result["rows"], result["machine"]
    print(
        f"{result['base_bytes'] / 1e9:.2f} GB bf16 base, r={RANK} on all seven projections, "
        f"max_shard_size {result['max_shard_size']}; median of {result['repeats']}, interleaved.\n"
        f"{machine_['cpu']}, {machine_['cores']} cores"
        + (f", {machine_['gpu']}" if machine_["gpu"] else "")
        + f"; Python {machine_['python']}, torch {machine_['torch']}, transformers {machine_['transformers']}, "
        f"peft {machine_['peft']}, Linux {machine_['kernel']}\n"
    )
    columns = ["method", "in-process s", "whole process s", "CPU s", "peak RSS MB", "of it imports"]
    columns += ["÷ cp", "÷ cp + fsync", "÷ PEFT", "load"]
    print(f"| {' | '.join(columns)} |")
    print(f"|{' --- |' * len(columns)}")

    def median(method: str, key: str) -> float | None:
        values = [row[key] for row in rows[method] if row[key] is not None]
        return statistics.median(values) if values else None

    def ratio(method: str, to: str) -> str:
        if to not in rows or not rows[to] or to == method:
            return "–"
        pairs = zip(reversed(rows[method]), reversed(rows[to]))  # a method that ran once did so in the last round
        return f"{statistics.median(a['seconds'] / b['seconds'] for a, b in pairs):.2f}"

    def megabytes(method: str, key: str) -> str:
        value = median(method, key)
        return "–" if value is None else f"{value / 1e6:.0f}"

    for method in rows:
        cells = [method, *(f"{median(method, key):.2f}" for key in ("seconds", "process", "cpu"))]
        cells += [megabytes(method, key) for key in ("peak_rss", "imports_rss")]
        cells += [ratio(method, to) for to in ("cp", "cp+fsync", "peft")]
        print(f"| {' | '.join(cells)} | {median(method, 'load'):.1f} |")
    for c in result["compared"]:
        differing = f"{c['differing_elements']} of {c['elements']} differ by {c['most_bf16_steps']} bf16 steps at most"
        verdict = "bit-identical" if c["equal"] else differing
        print(f"\n{c['of'][0]} and {c['of'][1]}: {verdict} ({c['tensors']} tensors)")


if __name__ == "__main__":
    raise SystemExit(main())
