"""merge_report.json: what a merge did, module by module, and what looks wrong in it."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal as human_bytes

from surgvqa.checkpoint.writer import Writer
from surgvqa.config.options import DataOptions
from surgvqa.config.settings import settings_of
from surgvqa.errors import UsageError
from surgvqa.files import read_json
from surgvqa.merge.adapter import Adapter
from surgvqa.terminal.figures import counted

if TYPE_CHECKING:
    from surgvqa.merge.plan import Plan


def make_report(plan: Plan, writer: Writer, seconds: dict[str, float], peak_rss_bytes: int) -> dict[str, Any]:
    """The report; norms are Frobenius norms in float32.

    `delta_ratio` is ‖ΔW‖/‖W‖. `rounding_loss` is ‖W'−(W+ΔW)‖/‖ΔW‖, the share of the change that was lost by rounding to
    the output's dtype, measured on one row in eight of each module. A module's `seconds` is the time that threads spent
    computing it: reading W and its factors, product, casts, norms, but not hashing and writing. Threads work in
    parallel, so the sum over all modules may exceed `merge` in `seconds_by_phase`.
    """
    shards = writer.record["shards"]
    tensors = {name: stats for _, shard in sorted(shards.items()) for name, stats in shard["tensors"].items()}
    modules = [
        {"module": name.removesuffix(".weight"), **_place(name), **stats, "delta_ratio": _ratio(stats)}
        for name, stats in tensors.items()
        if stats["what"] in ("lora", "dora")
    ]
    replaced = [
        {"tensor": name, **stats, "delta_ratio": _ratio(stats)}
        for name, stats in tensors.items()
        if stats["what"] == "replaced"
    ]
    not_finite = [n for n, s in tensors.items() if not all(map(_finite, s.values()))]
    kinds = Counter(plan.kinds.values())
    before = Counter(info.dtype for info in plan.base.tensors.values())
    after = Counter(s.dtype for shard in plan.checkpoint.shards for s in shard.sources)
    return {
        "output": str(plan.checkpoint.output),
        "modules_merged": len(modules),
        "tensors_copied": kinds["copied"],
        "tensors_cast": kinds["cast"],
        "tensors_replaced": kinds["replaced"],
        "device": plan.device,
        "seconds_by_phase": {k: round(v, 3) for k, v in seconds.items()},
        "peak_rss_bytes": peak_rss_bytes,
        "shards_reused": len(writer.reused),
        "dtypes_before": dict(before),
        "dtypes_after": dict(after),
        "modules": modules,
        "by_layer": _grouped(modules, "layer"),
        "by_kind": _grouped(modules, "kind"),
        "rounding_loss": _median([m["rounding_loss"] for m in modules]),
        "replaced": replaced,
        "copied": sorted(name for name, kind in plan.kinds.items() if kind == "copied"),
        "not_finite": not_finite,
        "stage2": stage2_facts(plan.adapter),
        "warnings": plan.warnings + _suspicious(plan, modules, replaced, not_finite),
    }


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _ratio(stats: dict[str, Any]) -> float | None:
    if stats.get("delta_norm") is None or not stats.get("w_norm"):
        return None
    return float(stats["delta_norm"]) / float(stats["w_norm"])


def _place(name: str) -> dict[str, Any]:
    """layers.3.self_attn.q_proj.weight -> layer 3, kind q_proj."""
    layer = re.search(r"\.(?:layers|blocks)\.(\d+)\.", name)
    return {"layer": int(layer[1]) if layer else None, "kind": name.removesuffix(".weight").rsplit(".", 1)[-1]}


def _median(values: list[float | None]) -> float | None:
    known = sorted(v for v in values if v is not None and math.isfinite(v))
    return known[len(known) // 2] if known else None


def _grouped(modules: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """‖ΔW‖/‖W‖ and seconds of all modules per layer or per kind. The squares of norms add up."""
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for module in modules:
        groups[module[key]].append(module)
    rows = []
    for value in sorted(groups, key=lambda v: (v is None, v)):
        delta = math.sqrt(sum(m["delta_norm"] ** 2 for m in groups[value]))
        weight = math.sqrt(sum(m["w_norm"] ** 2 for m in groups[value]))
        rows.append(
            {
                key: value,
                "modules": len(groups[value]),
                "delta_ratio": delta / weight if weight else None,
                "rounding_loss": _median([m["rounding_loss"] for m in groups[value]]),
                "seconds": round(sum(m.get("seconds", 0.0) for m in groups[value]), 6),
            }
        )
    return rows


def _suspicious(
    plan: Plan, modules: list[dict[str, Any]], replaced: list[dict[str, Any]], not_finite: list[str]
) -> list[str]:
    """Warnings that a researcher should read before training on the result."""
    found = [f"{name}: contains NaN or infinity" for name in not_finite]
    zero = [m["module"] for m in modules if m["what"] == "lora" and m["delta_norm"] == 0]
    if zero:
        found.append(f"{len(zero)} of {len(modules)} modules have a zero delta (an untrained lora_B?), first {zero[0]}")
    for entry in replaced:
        if entry.get("delta_norm") == 0:
            found.append(f"{entry['tensor']}: the {entry['from']}'s tensor equals the base's; was it trained?")
    large = [m for m in modules if (m["delta_ratio"] or 0) > 1]
    if large:
        worst = max(large, key=lambda m: m["delta_ratio"])
        found.append(
            f"{counted(len(large), 'module')} changed by more than their own norm, most {worst['module']} "
            f"({worst['delta_ratio']:.1f}×); is this the base that the adapter was trained on?"
        )
    stage2 = stage2_facts(plan.adapter)
    if stage2.get("quantised_base"):
        found.append(
            "Stage 2 was trained on a quantised base: its LoRA also compensates quantisation errors that the BF16 "
            "base does not have; expect a small shift, and continue training"
        )
    return found


def stage2_facts(adapter: Adapter) -> dict[str, Any]:
    """How Stage 2 was trained, as far as its folder shows."""
    config = adapter.config
    keys = (
        "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "lora_bias", "fan_in_fan_out",
        "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "peft_version",
        "task_type",
    )  # fmt: skip
    facts: dict[str, Any] = {k: config[k] for k in keys if config.get(k) not in (None, {}, [])}
    dtypes = {m.a.dtype for m in adapter.modules.values()}
    facts["adapter_dtype"] = sorted(dtypes)
    card = _read_text(adapter.folder / "README.md")
    if re.search(r"load_in_4bit:\s*True|bnb_4bit_quant_type:\s*(nf4|fp4)", card):
        facts["quantised_base"] = "4-bit"
    elif re.search(r"load_in_8bit:\s*True", card) or config.get("loftq_config"):
        facts["quantised_base"] = "8-bit or LoftQ"
    with contextlib.suppress(UsageError):  # not trained by this program
        options = read_json(adapter.folder / "surgvqa.json").get("options")
        if isinstance(options, dict):
            facts["shown"] = {k: options[k] for k in settings_of(DataOptions) if k in options}
    for folder in (adapter.folder, adapter.folder.parent):
        try:
            state = read_json(folder / "trainer_state.json")
        except UsageError:
            continue
        facts |= {k: state[k] for k in ("epoch", "global_step", "best_metric") if state.get(k) is not None}
        break
    return facts


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def show_report(console: Any, data: dict[str, Any], report: dict[str, Any]) -> None:
    """Prints the report: a bar per layer, the rounding loss, and what looks wrong."""
    from rich.text import Text

    rate = human_bytes(int(data["bytes"] / max(data["seconds"], 1e-9)))
    console.print(
        f"{data['output']}: {human_bytes(data['bytes'])} in {counted(data['shards'], 'shard')}, "
        f"{data['seconds']:.1f} s ({rate}/s), peak memory {human_bytes(data['peak_rss_bytes'])}"
    )
    console.print(
        f"{counted(report['modules_merged'], 'module')} merged, {counted(report['tensors_replaced'], 'tensor')} "
        f"replaced, {report['tensors_cast']} cast, {report['tensors_copied']} copied untouched"
    )
    rows = [r for r in report["by_layer"] if r["delta_ratio"] is not None and math.isfinite(r["delta_ratio"])]
    largest = max((r["delta_ratio"] for r in rows), default=0.0)
    for row in rows:
        bar = "█" * round(30 * row["delta_ratio"] / largest) if largest else ""
        name = "other" if row["layer"] is None else f"layer {row['layer']}"
        console.print(f"  {name:<9} ‖ΔW‖/‖W‖ {row['delta_ratio']:.2e} {bar}")
    if report["rounding_loss"] is not None:
        console.print(f"rounding to BF16 lost {report['rounding_loss']:.2%} of the change (median over modules)")
    if report["by_kind"]:
        slowest = max(report["by_kind"], key=lambda row: row["seconds"])
        total = sum(row["seconds"] for row in report["by_kind"])
        console.print(
            f"the modules took {total:.1f} s of all threads; {slowest['kind']} took most, "
            f"{slowest['seconds']:.1f} s for {counted(slowest['modules'], 'module')}"
        )
    for text in report["warnings"]:
        console.print(Text.assemble(("warning:", "yellow"), f" {text}"))
