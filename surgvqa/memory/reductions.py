"""Needing less memory: how many layers must recompute for a training to fit, and what to give up when it did not.

Torch-free and without effects; training/recipe.py and training/step_down.py act on what is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from presets import Preset
from surgvqa.config.options import TrainOptions
from surgvqa.config.settings import convert, settings_of
from surgvqa.memory import predict
from surgvqa.memory.activations import Configuration
from surgvqa.memory.clip import clip_of
from surgvqa.memory.fit import MARGIN
from surgvqa.memory.fit import fit as fastest_that_fits
from surgvqa.memory.predict import Prediction
from surgvqa.model.sizes import checkpoint_sizes

SHOWN = ("num_frames", "image_size")
"""The settings of a preset that can change within a run; what else it sets takes effect in new runs only."""


class Forecast:
    """Predictions of the training at hand."""

    def __init__(self, options: TrainOptions, frame_size: tuple[int, int], **overrides: Any):
        """`frame_size`: width and height in pixels of the largest frame. `overrides`: the fields of
        memory.Configuration that the options leave open and the run has decided."""
        self.sizes, self.weights = checkpoint_sizes(options.model_name_or_path)
        self.frame_size = frame_size
        self.overrides = overrides

    def of(self, options: TrainOptions) -> Prediction:
        """With these options."""
        return predict.predict(self.sizes, self._configuration(options), self.weights)

    def fastest(self, options: TrainOptions, limit_gb: float) -> Prediction | None:
        """With these options but the fewest recomputing layers that fit; None when nothing does."""
        return fastest_that_fits(
            self.sizes, self._configuration(options), limit_gb, self.weights, capped=options.enforce_budget
        )

    def _configuration(self, options: TrainOptions) -> Configuration:
        clip = clip_of(self.sizes, options, self.frame_size)
        return predict.configuration(self.sizes, options, clip=clip, **self.overrides)


@dataclass(frozen=True)
class Fit:
    """How many of the language model's layers recompute from the start, what the others keep, and why."""

    recomputing: int
    layers: int
    why: str
    prediction: Prediction | None = None
    warning: str | None = None

    keep: str = "products"
    """What compiled layers keep (layers.compile_layers)."""

    @property
    def text(self) -> str:
        """In words."""
        fitted = self.prediction
        kept = f"; compiled layers keep {fitted.kept}" if fitted and fitted.configuration.compiled else ""
        count = f"{self.recomputing} of {self.layers} layers" if self.recomputing < self.layers else "all layers"
        return f"{count if self.recomputing else 'no layer'} recomputed in the backward pass ({self.why}){kept}"


def fit(
    options: TrainOptions, layers: int, forecast: Forecast | None, limit_gb: float, presets: Sequence[Preset] = ()
) -> Fit:
    """What `options` ask for; where they leave it open, the fastest plan whose predicted peak is within `limit_gb`.

    Without a forecast (on a CPU) all layers recompute. When nothing fits all do, with a warning that names the first of
    the `presets` that would.
    """
    if not options.gradient_checkpointing:
        asked, why = 0, "gradient_checkpointing is off"
    elif options.checkpointed_layers is not None:
        asked, why = options.checkpointed_layers, "checkpointed_layers"
    elif forecast is None:
        asked, why = layers, "no GPU to fit"
    else:
        found = forecast.fastest(options, limit_gb)
        if found:
            count = found.configuration.recomputing(forecast.sizes)
            why = f"the fewest that fit: {found.needed_gb(options.enforce_budget):.1f} of {limit_gb:.1f} GB predicted"
            return Fit(count, layers, why, found, keep=found.configuration.keep)
        asked, why = layers, "and still more than the budget"
    keeps = [options.keep_activations] if options.keep_activations != "auto" else ["all", "products"]
    if forecast is None:
        return Fit(asked, layers, why, keep=keeps[-1])
    for keep in keeps:
        prediction = forecast.of(changed(options, checkpointed_layers=asked, keep_activations=keep))
        room_gb = limit_gb if len(keeps) == 1 else limit_gb * (1 - MARGIN)
        if prediction.fits(room_gb, options.enforce_budget):
            break
    if prediction.fits(limit_gb, options.enforce_budget):
        return Fit(asked, layers, why, prediction, keep=prediction.configuration.keep)
    warning = (
        f"predicted peak {prediction.needed_gb(options.enforce_budget):.1f} GB, {limit_gb:.1f} GB to be had; "
        f"{_smaller_that_fits(options, asked, layers, forecast, limit_gb, presets)}"
    )
    return Fit(asked, layers, why, prediction, warning, prediction.configuration.keep)


def _smaller_that_fits(
    options: TrainOptions, asked: int, layers: int, forecast: Forecast, limit_gb: float, presets: Sequence[Preset]
) -> str:
    found = asked < layers and forecast.fastest(options, limit_gb)
    if found:
        count, needed = found.configuration.recomputing(forecast.sizes), found.needed_gb(options.enforce_budget)
        return f"--gradient_checkpointing True --checkpointed_layers {count} would take {needed:.1f} GB"
    reduction = next_reduction(options, layers, layers, presets, forecast, limit_gb)
    if reduction:
        return f"--preset {reduction.preset} would take {reduction.predicted_gb:.1f} GB"
    return "no preset fits either: fewer frames, a smaller --image_size or --lora_r, or a larger GPU"


@dataclass(frozen=True)
class Reduction:
    """Settings that need less memory, to go on with."""

    settings: dict[str, Any]
    preset: str | None = None
    """Its name; None for a reduction that costs time only."""
    predicted_gb: float | None = None

    @property
    def text(self) -> str:
        """What changes, in words."""
        what = f"preset {self.preset}: " if self.preset else ""
        named = ", ".join(f"{name} {value}" for name, value in self.settings.items() if name in SHOWN)
        predicted = f" ({self.predicted_gb:.1f} GB predicted)" if self.predicted_gb is not None else ""
        return f"{what}{named or 'all layers recompute'}{predicted}"


def next_reduction(
    options: TrainOptions,
    recomputing: int,
    layers: int,
    presets: Sequence[Preset],
    forecast: Forecast | None,
    limit_gb: float,
    evaluating: bool = False,
) -> Reduction | None:
    """The next way to need less memory than now; None when nothing is left to give up.

    First all layers recompute: that costs time, not information (in an evaluation it would save nothing). Then the
    first of the `presets` that shows the model fewer pixels. Where there is a forecast, each must be predicted to fit
    into `limit_gb` and to need less than what just ran out of memory.
    """
    recompute: dict[str, Any] = {} if evaluating else {"gradient_checkpointing": True, "checkpointed_layers": layers}
    now = forecast.of(changed(options, checkpointed_layers=recomputing)) if forecast else None

    def suffices(other: TrainOptions) -> tuple[bool, float | None]:
        if forecast is None or now is None:
            return True, None
        needed = forecast.of(other).needed_gb(options.enforce_budget)
        return needed <= limit_gb and needed < now.needed_gb(options.enforce_budget), needed

    if not evaluating and recomputing < layers:
        enough, needed = suffices(changed(options, **recompute))
        if enough:
            return Reduction(recompute, None, needed)
    known = settings_of(TrainOptions)
    for preset in presets:
        shown = {
            key: convert(known[key], preset.settings[key], str(preset.file)) for key in SHOWN if key in preset.settings
        }
        smaller = changed(options, **{"checkpointed_layers": recomputing, **recompute, **shown})
        if _pixels(smaller) >= _pixels(options):
            continue
        enough, needed = suffices(smaller)
        if enough:
            return Reduction(shown | recompute, preset.name, needed)
    return None


def changed(options: TrainOptions, **settings: Any) -> TrainOptions:
    """A copy with these settings, and with whatever else hangs on the options."""
    other = copy(options)
    for name, value in settings.items():
        setattr(other, name, value)
    return other


def _pixels(options: TrainOptions) -> int:
    return options.num_frames * options.image_size**2
