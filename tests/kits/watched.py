"""A training of the small model, watched."""

from pathlib import Path

from surgvqa.errors import SurgvqaError
from surgvqa.runs.folder import Run
from surgvqa.training import checkpoints, command


class Watched:
    """A finished run: result, events, and its folders."""

    def __init__(self, options, runs_dir: Path, on_event=lambda event: None):
        self.events = []

        def observe(event):
            self.events.append(event)
            on_event(event)

        with Run.create(runs_dir, "train", observer=observe) as run:
            self.run = run
            try:
                self.result = command.run(options, run).data
            except SurgvqaError as error:
                self.error = error
                self.result = None
        self.output = Path(options.output_dir or run.folder / "checkpoints")

    def of(self, kind: str) -> list[dict]:
        return [event for event in self.events if event["kind"] == kind]

    def losses(self) -> dict[int, float]:
        return {event["step"]: event["loss"] for event in self.of("metric")}


def adapter_of(folder: Path):
    from safetensors.torch import load_file

    return load_file(folder / checkpoints.ADAPTER)


def assert_same_adapter(left: Path, right: Path, **tolerance):
    import torch

    one, other = adapter_of(left), adapter_of(right)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"rtol": 0, "atol": 0}))
