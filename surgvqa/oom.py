"""When the GPU's memory runs out: say what happened, save what was learned, name the way on."""

from __future__ import annotations

import gc
import re
import traceback
from typing import TYPE_CHECKING

import torch

from presets import Preset, ladder
from surgvqa.config import TrainOptions
from surgvqa.errors import SurgvqaError

if TYPE_CHECKING:
    from surgvqa.trainer import EventTrainer


def out_of_memory(error: torch.OutOfMemoryError, trainer: EventTrainer, options: TrainOptions) -> SurgvqaError:
    """Emits the `oom` event, saves the last whole step, and returns the error that names the preset to go on with.

    An optimiser step or a save that was cut short is not saved: the weights may be half updated.
    """
    step, activity = trainer.state.global_step, trainer.activity
    text = " ".join(str(error).split("\n")[0].split())
    smaller = next_preset(options)
    traceback.clear_frames(error.__traceback__)  # they hold the activations
    trainer.model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trainer.events.emit(
        "oom",
        step=step,
        phase=activity,
        text=text,
        requested=requested_size(text),
        next_preset=smaller.name if smaller else None,
        next_settings=smaller.settings if smaller else None,
    )
    if activity in ("forward and backward", "evaluate"):
        trainer.save_last_step()
    way_on = (
        f"go on as in preset {smaller.name}: surgvqa train --resume {trainer.events.id} "
        + " ".join(f"--{name} {value}" for name, value in smaller.settings.items())
        if smaller
        else "this is already the smallest preset; take a smaller --image_size or a larger GPU"
    )
    return SurgvqaError(f"out of GPU memory at step {step} ({activity}): {text}; {way_on}")


def next_preset(options: TrainOptions) -> Preset | None:
    """The first preset of the ladder that shows the model fewer pixels than `options` do."""

    def pixels(frames: int, size: int) -> int:
        return frames * size**2

    now = pixels(options.num_frames, options.image_size)
    for preset in ladder():
        frames = preset.settings.get("num_frames", options.num_frames)
        size = preset.settings.get("image_size", options.image_size)
        if pixels(frames, size) < now:
            return preset
    return None


def requested_size(text: str) -> str | None:
    """What torch says that it tried to allocate, such as 2.00 GiB."""
    found = re.search(r"allocate ([\d.]+ [KMG]iB)", text)
    return found.group(1) if found else None
