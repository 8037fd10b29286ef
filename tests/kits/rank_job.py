"""`surgvqa train` whose ranks are disturbed: `torchrun --nproc_per_node=2 tests/kits/rank_job.py train …`, or
`python tests/kits/rank_job.py train --gpus 2 …`.

RANK_JOB holds JSON: {"out_of_memory": [rank, call], "in_layer": …, "kill": [rank, step], "stop": …, "freeze": …}. A
call is one of the model's forward passes. `in_layer` has [rank, call, way, text] of each error in a layer, where a call
is one of all its layers' together, and the way forward, backward or killed. The others happen as the step ends.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

IN_PIECES = (
    "CUDA out of memory. Tried to allocate 1.00 GiB. Of the allocated memory 3.00 GiB is allocated by PyTorch, and "
    "2.00 GiB is reserved by PyTorch but unallocated."
)
"""An error for which nothing is given up, once a step."""


def disturb(plan: dict) -> None:
    """On the rank that each entry names."""
    import torch
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2MLP
    from watched import ERROR

    from surgvqa.training.trainer import EventTrainer

    rank, calls = int(os.environ["RANK"]), 0
    forward, ended = EventTrainer.compute_loss, EventTrainer.end_of_step
    layer, layers = Qwen2MLP.__call__, 0

    def fail(text: str):
        raise torch.OutOfMemoryError(text or ERROR)

    def in_layer(self, *arguments, **keywords):
        nonlocal layers
        found, layers = layer(self, *arguments, **keywords), layers + 1
        for where, call, way, text in plan.get("in_layer", ()):
            if [where, call] != [rank, layers]:
                continue
            if way == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif way == "forward":
                fail(text)
            else:
                found.register_hook(lambda _, text=text: fail(text))
        return found

    def compute_loss(trainer, *arguments, **keywords):
        nonlocal calls
        calls += 1
        found = forward(trainer, *arguments, **keywords)
        if plan.get("out_of_memory") == [rank, calls]:
            raise torch.OutOfMemoryError(ERROR)
        return found

    def end_of_step(trainer):
        for name, number in (("kill", signal.SIGKILL), ("stop", signal.SIGTERM), ("freeze", signal.SIGSTOP)):
            if plan.get(name) == [rank, trainer.state.global_step]:
                os.kill(os.getpid(), number)
        ended(trainer)

    EventTrainer.compute_loss, EventTrainer.end_of_step = compute_loss, end_of_step
    Qwen2MLP.__call__ = in_layer


def launched(program: list[str], world, folder: Path, plan: dict, **changes) -> SimpleNamespace:
    """With the plan as RANK_JOB. What came of a launch: its exit code, output, events by kind, and output folder."""
    folder.mkdir()
    options = {"eval_data_path": str(world.eval), **changes}
    options = vars(world.train_options(**options)) if "resume" not in changes else changes
    words = [f"--{name}={value}" for name, value in options.items() if value is not None and name != "extra"]
    done = subprocess.run(
        [*program, __file__, "train", "--json", f"--workspace={folder}", *words],
        env={**os.environ, "RANK_JOB": json.dumps(plan), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    from surgvqa.runs.events import EventTail

    (run,) = (folder / "runs").iterdir()
    events = EventTail(run / "events.jsonl").read()
    of = {kind: [e for e in events if e["kind"] == kind] for kind in {e["kind"] for e in events}}
    output = Path(changes.get("output_dir") or run / "checkpoints")
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, of=of, output=output, run=run)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from surgvqa.cli import ranks
    from surgvqa.cli.main import main

    if "RANK" in os.environ:
        disturb(json.loads(os.environ["RANK_JOB"]))
    else:
        ranks.PROGRAM = (__file__,)
    sys.exit(main())
