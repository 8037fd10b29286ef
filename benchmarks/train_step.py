"""Measures one training step at real size on one GPU: the old way, then with each optimisation added in turn.

    python benchmarks/train_step.py                         # all variants, one after another on one model
    python benchmarks/train_step.py --only "old;+ compiled" # some of them
    python benchmarks/train_step.py --only "+ products kept, none" --profile FILE  # and a profile of a step

Prints a table: s/sample, ratio to the old way, peak memory (GB = 1e9 bytes), share of the card's measured matmul rate.
Needs a CUDA GPU with 80 GB and bitsandbytes for the 8-bit optimiser, but no checkpoint, because the weights are
random.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

OLD = dict(logits="full", cached=False, casts=True, compiled=False, keep="all", checkpointed=28, attention="sdpa",
           host=False, positions=False, frames=8, audio=1500, grid=(32, 36), rows=1,
           packed=False)  # fmt: skip
CACHED = dict(logits="answer", cached=True)
COMPILED = CACHED | dict(casts=False, compiled=True)
OURS = COMPILED | dict(host=True, positions=True)
SPOKEN = dict(audio=160, checkpointed=0, keep="products")
"""Audio tokens with audio_span spoken: a question of 2.7 s and the margin."""
FLASH = dict(attention="flash_attention_2")
VARIANTS: dict[str, dict[str, Any]] = {
    "old": {},
    "answer logits": dict(logits="answer"),
    "+ cached encoders": CACHED,
    "+ no LoRA casts": CACHED | dict(casts=False),
    "+ compiled": COMPILED,
    "+ embeddings on host, positions": OURS,
    "+ 17 checkpointed": OURS | dict(checkpointed=17),
    "+ products kept, none": OURS | dict(checkpointed=0, keep="products"),
    "spoken, products kept, none": OURS | SPOKEN,
    "spoken, all recompute": OURS | SPOKEN | dict(checkpointed=28),
    "spoken, 12 frames": OURS | SPOKEN | dict(frames=12),
    "flash-attn 2, 17 checkpointed": OURS | FLASH | dict(checkpointed=17),
    "flash-attn 2, products kept, none": OURS | FLASH | dict(checkpointed=0, keep="products"),
    "encoders in the step, sdpa": dict(logits="answer", casts=False, compiled=True),
    "encoders in the step, flash": dict(logits="answer", casts=False, compiled=True) | FLASH,
    "2 rows": OURS | dict(rows=2),
    "2 packed, sdpa": OURS | dict(rows=2, packed=True),
    "2 packed, flash-attn 2": OURS | FLASH | dict(rows=2, packed=True),
}
"""{variant: its changes to OLD}."""
ACCUMULATION = 4


def matmul_rate() -> float:
    """FLOP/s of an 8192³ bf16 product on random data, the reference for MFU."""
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
    """FLOP of a sample without recomputation.

    Forward and input gradients of the frozen matrices (4 per weight and token), all three products of the trained ones
    (6), and causal attention forward and backward (7·L²·hidden per layer).
    """
    from torch import nn

    from surgvqa.model.layers import decoder_layers

    layers = decoder_layers(model)
    frozen = sum(m.weight.numel() for n, m in layers.named_modules() if isinstance(m, nn.Linear) and "lora" not in n)
    return 4 * frozen * tokens + 6 * trained * tokens + 7 * len(layers) * tokens**2 * 3584


class Bench:
    """One model with its adapter, which each variant configures again."""

    def __init__(self) -> None:
        import bitsandbytes
        import real_size

        from surgvqa.config.options import LoraOptions
        from surgvqa.model.adapter import add_lora

        self.model = real_size.build("sdpa")
        self.peft_model = add_lora(self.model, LoraOptions(lora_r=64, lora_alpha=16, lora_dropout=0.05))
        self.trained = [p for p in self.peft_model.parameters() if p.requires_grad]
        self.fresh = [p.detach().to("cpu", copy=True) for p in self.trained]
        self.optimiser_of = bitsandbytes.optim.AdamW8bit
        self.rate = matmul_rate()

    def prepare(self, v: dict[str, Any]) -> dict[str, Any]:
        """Configures the model, resets its adapter, and returns a batch."""
        import real_size
        import torch

        from surgvqa.model import layers

        torch.manual_seed(0)
        for parameter, fresh in zip(self.trained, self.fresh):
            parameter.data.copy_(fresh)
        for part in (self.model.model.language_model, self.model.model.visual):
            part.config._attn_implementation = v["attention"]
        torch._dynamo.reset()
        for forward in layers.forwards(self.model):
            forward.compute = forward.plain
        for module in self.peft_model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = v["casts"]
        self.peft_model.train()
        layers.checkpoint_layers(self.peft_model, v["checkpointed"])
        if v["compiled"]:
            layers.compile_layers(self.peft_model, v["keep"])
        self.model.get_input_embeddings().to("cpu" if v["host"] else "cuda")
        encoders = (self.model.model.visual, self.model.audio_encoder)
        for encoder in encoders:
            encoder.to("cuda")
        data = real_size.batch(v["frames"], tuple(v["grid"]), rows=v["rows"], audio=v["audio"])
        if v["cached"]:
            with torch.no_grad():
                pixels = data.pop("pixel_values").to(torch.bfloat16)
                data["image_features"] = self.model.encode_images(pixels, data["image_grid_thw"]).clone()
                heard = self.model.encode_audio(data.pop("input_features"))
                data["audio_features"] = heard[:, : v["audio"]].flatten(0, 1).clone()
            for encoder in encoders:
                encoder.to("cpu")
        if v["packed"]:
            data = real_size.packed(data, self.model)
        elif v["positions"]:  # from the collator
            data["position_ids"] = self.model._positions(data["input_ids"], None, data["image_grid_thw"], None, 0)
        return data

    def measure(self, variant: dict[str, Any], steps: int = 4, profile: Path | None = None) -> dict[str, Any]:
        """Time and memory of a step. `profile`: file for the kernels of one step, longest first."""
        import torch
        import torch.nn.functional as F

        from surgvqa.model.torch_internals import compilations

        v = {**OLD, **variant}
        data = self.prepare(v)
        optimiser = self.optimiser_of(self.trained, lr=2e-4)
        before = compilations()

        def micro_step() -> Any:
            with torch.autocast("cuda", torch.bfloat16):
                if v["logits"] == "answer":
                    loss = self.peft_model(**data).loss
                else:  # as in transformers: logits of every position, in float32
                    labels = data["labels"]
                    logits = self.peft_model(**{k: t for k, t in data.items() if k != "labels"}).logits.float()
                    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            (loss / ACCUMULATION).backward()
            return loss.detach()

        def step() -> Any:
            for _ in range(ACCUMULATION):
                loss = micro_step()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            return loss

        gc.collect()
        torch.cuda.empty_cache()
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
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        free, total = torch.cuda.mem_get_info()
        if profile:
            profile.write_text(profiled(step))
        samples = ACCUMULATION * v["rows"]
        tokens = data["input_ids"].numel() // v["rows"]
        seconds = statistics.median(times) / samples
        flops = useful_flops(self.peft_model, tokens, sum(p.numel() for p in self.trained))
        return {
            "s_per_sample": round(seconds, 4),
            "steps_s": [round(t, 3) for t in times],
            "peak_gb": round(peak / 1e9, 2),
            "reserved_gb": round(reserved / 1e9, 2),
            "driver_gb": round((total - free) / 1e9, 2),
            "mfu": round(flops / seconds / self.rate, 3),
            "tokens": tokens,
            "first_loss": round(first, 4),
            "loss": round(float(loss), 4),
            **{name: count - before[name] for name, count in compilations().items()},
            "first_step_s": round(warm_up, 1),
        }


def profiled(step: Any) -> str:
    """The kernels of one step, longest first, and the gaps between them, in which the GPU waited."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    on_gpu = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = sorted((e.time_range.start, e.time_range.end, e.name) for e in on_gpu)
    gaps, busy, end = [], 0.0, kernels[0][0]
    for begin, finish, name in kernels:
        if begin > end:
            gaps.append((begin - end, begin - kernels[0][0], name))
        busy += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    lines = [
        f"{begin / 1e3:9.2f} ms  {gap / 1e3:7.3f} ms before {name[:100]}" for gap, begin, name in sorted(gaps)[-60:]
    ]
    wall = (end - kernels[0][0]) / 1e3
    short = sum(gap for gap, *_ in gaps if gap < 20) / 1e3
    return "\n".join(
        [
            f"{wall:.1f} ms, the GPU busy for {busy / 1e3:.1f} ms, {len(kernels)} kernels",
            f"gaps under 20 us: {short:.1f} ms; the longest:",
            *sorted(lines),
            recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90),
        ]
    )


def main() -> None:
    """Runs the variants one after another and prints the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of variants, separated by ;")
    parser.add_argument("--profile", type=Path, help="folder for the kernels of a step of each variant, longest first")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    import torch

    chosen = {n: VARIANTS[n.strip()] for n in arguments.only.split(";")} if arguments.only else VARIANTS
    results: dict[str, Any] = {}
    bench = Bench()
    machine = {"torch": torch.__version__, "card": torch.cuda.get_device_name(), "matmul_tflops": bench.rate / 1e12}
    print(machine)
    print(
        f"{'variant':34} {'s/sample':>9} {'vs old':>7} {'peak GB':>8} {'resvd':>6} {'MFU':>6} {'loss':>8} graphs"
        " failed  warm"
    )
    for number, (name, variant) in enumerate(chosen.items()):
        profile = arguments.profile and arguments.profile / f"profile{number}.txt"
        try:
            r = results[name] = bench.measure(variant, profile=profile)
        except Exception as error:
            print(f"{name:34} failed: {type(error).__name__} {str(error)[:200]}", flush=True)
            results[name] = {"error": str(error)[:1500]}
            traceback.clear_frames(error.__traceback__)  # frees what filled the GPU
            bench.peft_model.zero_grad(set_to_none=True)
            continue
        ratio = results["old"]["s_per_sample"] / r["s_per_sample"] if "s_per_sample" in results.get("old", {}) else 0
        print(f"{name:34} {r['s_per_sample']:9.4f} {ratio:6.2f}x {r['peak_gb']:8.2f} {r['reserved_gb']:6.1f} "
              f"{r['mfu']:6.3f} {r['loss']:8.4f} {r['graphs']:6d} {r['compile_failures']:6d} {r['first_step_s']:5.1f}",
              flush=True)  # fmt: skip
        if arguments.out:
            arguments.out.write_text(json.dumps({"machine": machine, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
