"""`surgvqa budget`: compares the memory of a configuration with the budget, and says what to change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from presets import Preset, load_presets
from surgvqa.config.options import BudgetOptions
from surgvqa.config.settings import convert, require_bounds, settings_of
from surgvqa.config.workspace import Workspace
from surgvqa.machine import gpu
from surgvqa.memory import fit, predict
from surgvqa.memory.predict import GB, MemoryPrediction
from surgvqa.model.sizes import Sizes, checkpoint_sizes, require_layers
from surgvqa.outcome import Outcome

GROUPS = {
    "weights": "weights",
    "training": "adapters and optimiser",
    "activations": "activations",
    "reserved": "allocator",
    "driver": "driver",
}
NO_GPU = "on a GPU; this machine has none"
WIDTH = 15
"""Width of a bar in cells; the table fits into 80 columns."""


def check(options: BudgetOptions) -> None:
    """Raises UsageError for numbers out of bounds."""
    require_bounds(options)


def run(options: BudgetOptions, workspace: Workspace) -> Outcome:
    """Exit code 0 when the predicted peak is within the budget, 1 when it is not."""
    sizes, weights = checkpoint_sizes(options.model_name_or_path) if options.model_name_or_path else (Sizes(), None)
    require_layers(options.checkpointed_layers, sizes.num_hidden_layers)
    configuration = predict.configuration(sizes, options)
    prediction = predict.predict(sizes, configuration, weights)
    fits = prediction.fits(options.budget_gb)
    peaks = preset_peaks(options, load_presets(workspace.root))
    fitted = fit.fit(sizes, configuration, options.budget_gb, weights)
    advice = _advice(options, prediction, fitted, peaks)
    choices = [{"text": text, "saves_gb": gb} for text, gb in fit.choices(sizes, configuration, weights)]
    data = {
        **document(prediction),
        "budget_gb": options.budget_gb,
        "fits": fits,
        "fastest_plan": fitted.plan if fitted else None,
        "fastest_checkpointed_layers": fitted.configuration.checkpointed_layers if fitted else None,
        "presets": peaks,
        "advice": advice,
        "choices": choices,
    }
    return Outcome(data, ok=fits, show=lambda console: _show(console, prediction, options.budget_gb, advice, choices))


def document(prediction: MemoryPrediction) -> dict[str, Any]:
    """A prediction as JSON keys."""
    return {
        "predicted_peak_gb": prediction.predicted_peak_gb,
        "predicted_reserved_gb": prediction.predicted_reserved_gb,
        "predicted_driver_gb": prediction.predicted_driver_gb,
        "peak_phase": prediction.phase,
        "phases": {name: nbytes / GB for name, nbytes in prediction.phases.items()},
        "components": [
            {"name": c.name, "gb": c.bytes / GB, "group": c.group, "most_gb": c.peak_bytes / GB}
            for c in prediction.components
        ],
        "sequence_tokens": prediction.configuration.clip.tokens,
        "plan": prediction.plan,
    }


def preset_peaks(options: BudgetOptions, presets: list[Preset]) -> dict[str, float]:
    """{preset: predicted peak in GB} with all other options unchanged."""
    return {p.name: predict.predict_options(with_preset(options, p)).predicted_peak_gb for p in presets}


def with_preset(options: BudgetOptions, preset: Preset) -> BudgetOptions:
    """The options with the preset's settings. Raises UsageError for a value of the wrong type or out of bounds."""
    known = settings_of(BudgetOptions)
    settings = {k: convert(known[k], v, str(preset.file)) for k, v in preset.settings.items() if k in known}
    changed = replace(options, **settings)
    check(changed)
    return changed


def _advice(
    options: BudgetOptions, prediction: MemoryPrediction, fitted: MemoryPrediction | None, peaks: dict[str, float]
) -> list[str]:
    spare = options.budget_gb - prediction.predicted_peak_gb
    if spare >= 0:
        lines = [f"fits: {spare:.1f} GB to spare"]
        if fitted:
            count = fitted.configuration.checkpointed_layers
            if options.gradient_checkpointing and options.checkpointed_layers is None:
                lines.append(f"train uses it for speed: {count} of {fitted.layers} layers recompute, {_gb(fitted)} GB")
                if fitted.configuration.compiled:
                    lines.append(f"compiled layers keep {fitted.kept}")
        return lines
    lines = [f"does not fit: {-spare:.1f} GB over the budget"]
    if fitted:
        count = fitted.configuration.checkpointed_layers
        lines.append(f"recompute {count} of {fitted.layers} layers (gradient_checkpointing): {_gb(fitted)} GB")
        return lines
    if prediction.configuration.ranks > 1 and not options.shard:
        divided = predict.predict_options(replace(options, shard=True))
        if divided.fits(options.budget_gb):
            return [*lines, f"--shard: {_gb(divided)} GB"]
    smaller = {name: peak for name, peak in peaks.items() if peak <= options.budget_gb}
    if smaller:
        lines += [f"--preset {name}: {peak:.1f} GB" for name, peak in smaller.items()]
    elif options.per_device_train_batch_size > 1:
        lines.append("--per_device_train_batch_size 1, with more gradient_accumulation_steps instead")
    else:
        lines.append("no preset fits: fewer frames, a smaller image_size or lora_r, or a larger GPU")
    return lines


def _gb(prediction: MemoryPrediction) -> str:
    return f"{prediction.predicted_peak_gb:.1f}"


def _show(
    console: Any, prediction: MemoryPrediction, budget_gb: float, advice: list[str], choices: list[dict[str, Any]]
) -> None:
    from rich.table import Table
    from rich.text import Text

    from surgvqa.terminal.drawing import bar, choice_line

    where = "" if gpu.any_gpu() else f"; {NO_GPU}"
    console.print(Text(f"{prediction.plan}; {prediction.configuration.clip.tokens} tokens{where}", "dim"))
    table = Table("component", "", "GB", "", box=None, pad_edge=False, header_style="dim")
    table.columns[2].justify = "right"
    for column in table.columns:
        column.no_wrap = True
    for group, heading in GROUPS.items():
        rows = [c for c in prediction.components if c.group == group]
        if group in ("weights", "training", "activations"):
            table.add_row(Text(heading, "bold"), "", Text(f"{sum(c.bytes for c in rows) / GB:.2f}", "bold"), "")
        for c in rows:
            largest = Text(f"({c.peak_bytes / GB:.2f} earlier)" if c.peak_bytes > c.bytes else "", "dim")
            share = bar(c.bytes / GB / budget_gb, WIDTH, alarm=False)
            table.add_row(f"  {c.name}", share, f"{c.bytes / GB:.2f}", largest)
        if group == "activations":
            _total(table, "peak, allocated", prediction.predicted_peak_gb, budget_gb, f"in {prediction.phase}")
        elif group == "reserved":
            _total(table, "peak, reserved", prediction.predicted_reserved_gb, budget_gb, "")
        elif group == "driver":
            _total(table, "as nvidia-smi shows it", prediction.predicted_driver_gb, budget_gb, "")
    console.print(table)
    fits = prediction.fits(budget_gb)
    console.print(Text(f"budget {budget_gb:g} GB: {advice[0]}", "green" if fits else "red"))
    for line in advice[1:]:
        console.print(f"  {line}")
    for choice in choices:
        console.print(Text(choice_line(**choice), "dim"))


def _total(table: Any, name: str, gb: float, budget_gb: float, note: str) -> None:
    from rich.text import Text

    from surgvqa.terminal.drawing import bar

    table.add_row(Text(name, "bold"), bar(gb / budget_gb, WIDTH), Text(f"{gb:.2f}", "bold"), Text(note, "dim"))
