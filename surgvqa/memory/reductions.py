"""How many layers must recompute for a training to fit, and what to give up when it runs out of memory.

Torch-free and without side effects; training/recipe.py and training/step_down.py act on these decisions.
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
from surgvqa.memory.clip import QUESTION_S, clip_of
from surgvqa.memory.fit import MARGIN
from surgvqa.memory.fit import fit as fastest_that_fits
from surgvqa.memory.predict import MemoryPrediction
from surgvqa.model.sizes import checkpoint_sizes

SHOWN = ("num_frames", "image_size", "audio_span")
"""The settings of a preset that can change within a run. Its other settings take effect only in new runs."""


class Forecast:
    """Predicts the memory of a training under changed options."""

    def __init__(
        self, options: TrainOptions, frame_size: tuple[int, int], question_s: float = QUESTION_S, **overrides: Any
    ):
        """`frame_size`: width and height of the largest frame in pixels. `question_s`: seconds of the longest spoken
        question. `overrides`: fields of Configuration that the run, not the options, has decided."""
        self.sizes, self.weights = checkpoint_sizes(options.model_name_or_path)
        self.frame_size, self.question_s = frame_size, question_s
        self.overrides = overrides

    def of(self, options: TrainOptions) -> MemoryPrediction:
        """The prediction for these options."""
        return predict.predict(self.sizes, self._configuration(options), self.weights)

    def fastest(self, options: TrainOptions, limit_gb: float) -> MemoryPrediction | None:
        """The prediction for these options with the fewest recomputing layers that fit; None if nothing fits."""
        return fastest_that_fits(
            self.sizes, self._configuration(options), limit_gb, self.weights, capped=options.enforce_budget
        )

    def _configuration(self, options: TrainOptions) -> Configuration:
        clip = clip_of(self.sizes, options, self.frame_size, self.question_s)
        return predict.configuration(self.sizes, options, clip=clip, **self.overrides)


@dataclass(frozen=True)
class Fit:
    """How many of the language model's layers recompute from the start, why, and what the others keep."""

    recomputing: int
    layers: int
    why: str
    prediction: MemoryPrediction | None = None
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
    """The plan that `options` ask for or, if they do not, the fastest one whose predicted peak is within `limit_gb`.

    All layers recompute if there is no forecast (on a CPU) or if nothing fits. In the latter case a warning names the
    first of the `presets` that would fit.
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
        f"predicted peak {prediction.needed_gb(options.enforce_budget):.1f} GB, {limit_gb:.1f} GB available; "
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
    divided = options.gpus != "1" and not options.shard and forecast.fastest(changed(options, shard=True), limit_gb)
    if divided:
        return f"--shard would take {divided.needed_gb(options.enforce_budget):.1f} GB"
    reduction = next_reduction(options, layers, layers, presets, forecast, limit_gb)
    if reduction:
        return f"--preset {reduction.preset} would take {reduction.predicted_gb:.1f} GB"
    return "no preset fits either: fewer frames, a smaller --image_size or --lora_r, or a larger GPU"


@dataclass(frozen=True)
class Reduction:
    """Settings with which the run continues in less memory."""

    settings: dict[str, Any]
    preset: str | None = None
    """Its name; None for a reduction that only costs time."""
    predicted_gb: float | None = None

    @property
    def text(self) -> str:
        """What changes, for messages."""
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
    """The next settings that need less memory than the current ones; None when nothing is left to give up.

    First, all layers recompute, which costs time but no information (skipped in an evaluation, where it saves nothing).
    Then comes the first of the `presets` that shows the model less: fewer pixels, or only the spoken part of the sound.
    With a forecast, the settings must be predicted to fit into `limit_gb` and to need less than those that ran out of
    memory. If a preset is not enough, the later ones keep what it gave up, unless they set it themselves.
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
    given_up: dict[str, Any] = {}
    for preset in presets:
        shown = given_up | {
            key: convert(known[key], preset.settings[key], str(preset.file)) for key in SHOWN if key in preset.settings
        }
        smaller = changed(options, **{"checkpointed_layers": recomputing, **recompute, **shown})
        if not _shows_less(smaller, options):
            continue
        given_up = shown
        enough, needed = suffices(smaller)
        if enough:
            return Reduction(shown | recompute, preset.name, needed)
    return None


def changed(options: TrainOptions, **settings: Any) -> TrainOptions:
    """A copy of `options` with these settings."""
    other = copy(options)
    for name, value in settings.items():
        setattr(other, name, value)
    return other


def _shows_less(one: TrainOptions, other: TrainOptions) -> bool:
    """Whether `one` shows the model less than `other` in some respect, and more in none."""
    seen = [options.num_frames * options.image_size**2 for options in (one, other)]
    heard = [options.audio_span == "full" for options in (one, other)]
    return seen[0] <= seen[1] and heard[0] <= heard[1] and (seen[0], heard[0]) != (seen[1], heard[1])
