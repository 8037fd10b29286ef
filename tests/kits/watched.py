"""A training of the small model, watched, and ways to disturb it."""

import functools
import json
import os
import signal
from pathlib import Path

import pytest

from surgvqa.errors import SurgvqaError
from surgvqa.runs.folder import Run
from surgvqa.training import checkpoints, command

ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …"
STEPS = {"learning_rate": 0.01, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
"""A saved state a step."""


def preset(num_frames: int, image_size: int, rung: int = 0) -> str:
    settings = f"[settings]\nnum_frames = {num_frames}\nimage_size = {image_size}\n"
    return f'reason = "r"\ngives_up = "g"\nrung = {rung}\n{settings}'


class Watched:
    """A run that is over: its result or error, its events and folders.

    `seen` holds (sample, how it is shown) of each finished micro step, and `rows` the image rows (pixels or features)
    that the model got in each forward pass. `presets` are put beside `runs_dir`, as those of its workspace.
    """

    def __init__(self, options, runs_dir: Path, presets: tuple[str, ...] = (), on_event=lambda event: None):
        from surgvqa.training.trainer import EventTrainer

        for number, text in enumerate(presets):
            file = runs_dir.parent / f"presets/own-{number}.toml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        self.events, self.seen, self.rows, self.result, self.error = [], [], [], None, None
        original, forward = EventTrainer.training_step, EventTrainer.compute_loss

        def observe(event):
            self.events.append(event)
            on_event(event)

        def training_step(trainer, wrapped, inputs, *arguments, **keywords):
            found = original(trainer, wrapped, inputs, *arguments, **keywords)
            self.seen += [(index, inputs["shown"]) for index in inputs["sample_indices"]]
            return found

        def compute_loss(trainer, wrapped, inputs, *arguments, **keywords):
            self.rows.append(len(inputs.get("image_features", inputs.get("pixel_values"))))
            return forward(trainer, wrapped, inputs, *arguments, **keywords)

        with pytest.MonkeyPatch.context() as patched, Run.create(runs_dir, "train", observer=observe) as run:
            patched.setattr(EventTrainer, "training_step", training_step)
            patched.setattr(EventTrainer, "compute_loss", compute_loss)
            self.run = run
            try:
                self.result = command.run(options, run).data
            except SurgvqaError as error:
                self.error = error
        self.output = Path(options.output_dir or run.folder / "checkpoints")

    def of(self, kind: str) -> list[dict]:
        return [event for event in self.events if event["kind"] == kind]

    def losses(self) -> dict[int, float]:
        return {event["step"]: event["loss"] for event in self.of("metric")}

    def logged(self) -> list[float]:
        """Trainer's own losses, which go to W&B."""
        state = json.loads((checkpoints.checkpoints(self.output)[0] / "trainer_state.json").read_text())
        return [row["loss"] for row in state["log_history"] if "loss" in row]

    def actions(self) -> list[str]:
        """What was done about each out-of-memory error."""
        return [event["action"] for event in self.of("oom")]


def adapter_of(folder: Path):
    from safetensors.torch import load_file

    return load_file(folder / checkpoints.ADAPTER)


def assert_same_adapter(left: Path, right: Path, **tolerance):
    import torch

    one, other = adapter_of(left), adapter_of(right)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"rtol": 0, "atol": 0}))


def assert_same(one: Watched, other: Watched):
    """Losses and weights, bit by bit."""
    assert one.error is None and other.error is None
    assert one.losses() == other.losses()
    assert_same_adapter(one.output, other.output)


def constant_rate(options):
    """The learning rate does not depend on max_steps."""
    options.extra = {"lr_scheduler_type": "constant"}
    return options


def out_of_memory(monkeypatch, owner, name: str, when):
    """`owner.name` raises torch's error after it has done its work (so that the work has to be taken back), whenever
    `when(call, object)` says so; calls count from 1."""
    import torch

    original, count = getattr(owner, name), 0

    @functools.wraps(original)
    def raises(self, *arguments, **keywords):
        nonlocal count
        count += 1
        fails = when(count, self)
        found = original(self, *arguments, **keywords)
        if fails:
            raise torch.OutOfMemoryError(ERROR)
        return found

    monkeypatch.setattr(owner, name, raises)


def places() -> dict:
    """Where memory runs out in a micro step."""
    from accelerate import Accelerator

    from surgvqa.training.trainer import EventTrainer

    return {"forward": (EventTrainer, "compute_loss"), "backward": (Accelerator, "backward")}


def stop_in(monkeypatch, method: str, call: int) -> None:
    """SIGTERM to ourselves as the given call (1, 2, …) of a method of the trainer ends."""
    from surgvqa.training.trainer import EventTrainer

    count, original = 0, getattr(EventTrainer, method)

    def stops(self, *arguments, **keywords):
        nonlocal count
        count += 1
        found = original(self, *arguments, **keywords)
        if count == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(EventTrainer, method, stops)
