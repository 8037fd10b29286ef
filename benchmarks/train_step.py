"""One training step at real size on one GPU: the old way, then each lever added in turn.

    python benchmarks/train_step.py                  # all variants, each in a process of its own
    python benchmarks/train_step.py --only "old;+ compiled" # some of them
    python benchmarks/train_step.py --one '{"name": "…", …}'

Prints a table: s/sample, ratio to the old way, peak memory (GB = 1e9 bytes), share of the card's measured matmul rate.
Needs a CUDA GPU with 80 GB, bitsandbytes for the 8-bit optimiser, and no checkpoint: the weights are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

OLD = dict(logits="full", cached=False, casts=True, compiled=False, keep="all", checkpointed=28, dropout=0.05,
           attention="sdpa", host=False, frames=8, grid=(32, 36), rows=1, packed=False)  # fmt: skip
FLASH = dict(attention="flash_attention_2")
OURS = dict(logits="answer", cached=True, casts=False, compiled=True, host=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "old": {},
    "answer logits": dict(logits="answer"),
    "+ cached encoders": dict(logits="answer", cached=True),
    "+ no LoRA casts": dict(logits="answer", cached=True, casts=False),
    "+ compiled": dict(logits="answer", cached=True, casts=False, compiled=True),
    "+ token embeddings on the host": OURS,
    "+ 17 checkpointed": OURS | dict(checkpointed=17),
    "+ products kept, none": OURS | dict(checkpointed=0, keep="products"),
    "+ products kept, none, no dropout": OURS | dict(checkpointed=0, keep="products", dropout=0.0),
    "flash-attn 2, 14 checkpointed": OURS | FLASH | dict(checkpointed=14),
    "flash-attn 2, products kept, none": OURS | FLASH | dict(checkpointed=0, keep="products"),
    "encoders in the step, sdpa": dict(logits="answer", casts=False, compiled=True),
    "encoders in the step, flash": dict(logits="answer", casts=False, compiled=True) | FLASH,
    "2 rows": OURS | dict(rows=2),
    "2 packed, sdpa": OURS | dict(rows=2, packed=True),
    "2 packed, flash-attn 2": OURS | FLASH | dict(rows=2, packed=True),
}  # fmt: skip
ACCUMULATION = 4


def matmul_rate() -> float:
    """FLOP/s of an 8192³ bf16 product on random data: the ceiling that MFU is a share of."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - start)


def useful_flops(model: Any, tokens: int, trained: int) -> float:
    """FLOP of a sample without any recomputation: forward and input gradients of the frozen matrices (4 per weight and
    token), all three products of the trained ones (6), causal attention forward and backward (7·L²·hidden a layer)."""
    from torch import nn

    from surgvqa.layers import decoder_layers

    layers = decoder_layers(model)
    frozen = sum(m.weight.numel() for n, m in layers.named_modules() if isinstance(m, nn.Linear) and "lora" not in n)
    return 4 * frozen * tokens + 6 * trained * tokens + 7 * len(layers) * tokens**2 * 3584


def measure(variant: dict[str, Any], steps: int = 4, profile: Path | None = None) -> dict[str, Any]:
    """One variant in this process; `profile`: file for the kernels of one step, the longest first."""
    import bitsandbytes
    import real_size
    import torch
    import torch.nn.functional as F

    from surgvqa import layers
    from surgvqa.config import LORA_TARGETS
    from surgvqa.lora import add_lora

    v = {**OLD, **variant}
    model = real_size.build(v["attention"])

    class Lora:
        lora_r, lora_alpha, lora_dropout, lora_target_modules = 64, 16, v["dropout"], LORA_TARGETS

    peft_model = add_lora(model, Lora)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    layers.checkpoint_layers(peft_model, v["checkpointed"])
    if not v["casts"]:
        layers.lora_without_casts(peft_model)
    if v["compiled"]:
        layers.compile_layers(peft_model, v["keep"])
    peft_model.train()
    data = real_size.batch(v["frames"], tuple(v["grid"]), rows=v["rows"])
    if v["cached"]:
        with torch.no_grad():
            pixels = data.pop("pixel_values").to(torch.bfloat16)
            data["image_features"] = model.encode_images(pixels, data["image_grid_thw"]).clone()
            data["audio_features"] = model.encode_audio(data.pop("input_features")).clone()
        del pixels
        model.model.visual.to("cpu")
        model.audio_encoder.to("cpu")
        torch.cuda.empty_cache()
    if v["host"]:
        model.embeddings_to_host()
    if v["packed"]:
        data = real_size.packed(data, model)
    optimiser = bitsandbytes.optim.AdamW8bit(trained, lr=2e-4)

    def micro_step() -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            if v["logits"] == "answer":
                loss = peft_model(**data).loss
            else:  # as transformers computes it: logits of every position, in float32
                labels = data["labels"]
                logits = peft_model(**{k: t for k, t in data.items() if k != "labels"}).logits.float()
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        (loss / ACCUMULATION).backward()
        return loss

    def step() -> Any:
        for _ in range(ACCUMULATION):
            loss = micro_step()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss

    start = time.perf_counter()
    first = float(step())
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - start
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            step()
            torch.cuda.synchronize()
        profile.write_text(recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=60))
    samples = ACCUMULATION * v["rows"]
    tokens = data["input_ids"].numel() // v["rows"]
    free, total = torch.cuda.mem_get_info()
    seconds = statistics.median(times) / samples
    flops = useful_flops(peft_model, tokens, sum(p.numel() for p in trained))
    return {
        "s_per_sample": round(seconds, 4),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "driver_gb": round((total - free) / 1e9, 2),
        "mfu": round(flops / seconds / matmul_rate(), 3),
        "tokens": tokens,
        "first_loss": round(first, 4),
        "loss": round(float(loss), 4),
        **layers.compilations(),
        "first_step_s": round(warm_up, 1),
        "spread": round((max(times) - min(times)) / statistics.median(times), 3),
        "versions": {"torch": torch.__version__, "card": torch.cuda.get_device_name()},
    }


def main() -> None:
    """Runs the variants one after another and prints the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of variants, separated by ;")
    parser.add_argument("--one", help="a variant as JSON: measured in this process, printed as JSON")
    parser.add_argument("--profile", type=Path, help="with --one: write the kernels of one step, the longest first")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one), profile=arguments.profile)))
        return
    chosen = {n: VARIANTS[n.strip()] for n in arguments.only.split(";")} if arguments.only else VARIANTS
    results: dict[str, Any] = {}
    print(
        f"{'variant':32} {'s/sample':>9} {'vs old':>7} {'peak GB':>8} {'resvd':>6} {'MFU':>6} {'loss':>8} graphs"
        " failed  warm"
    )
    for name, variant in chosen.items():
        run = subprocess.run([sys.executable, __file__, "--one", json.dumps(variant)], capture_output=True, text=True)
        if run.returncode:
            print(f"{name:32} failed: {(run.stderr.strip().splitlines() or ['?'])[-1][:150]}", flush=True)
            results[name] = {"error": run.stderr[-1500:]}
            continue
        r = results[name] = json.loads(run.stdout.strip().splitlines()[-1])
        ratio = results["old"]["s_per_sample"] / r["s_per_sample"] if "s_per_sample" in results.get("old", {}) else 0
        print(f"{name:32} {r['s_per_sample']:9.4f} {ratio:6.2f}x {r['peak_gb']:8.2f} {r['reserved_gb']:6.1f} "
              f"{r['mfu']:6.3f} {r['loss']:8.4f} {r['graphs']:6d} {r['compile_failures']:6d} {r['first_step_s']:5.1f}",
              flush=True)  # fmt: skip
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
