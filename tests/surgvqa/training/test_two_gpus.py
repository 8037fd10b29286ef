"""A model divided among two GPUs: it is gathered through NCCL, and a rank that is lost leaves the other one waiting."""

import sys

import pytest
import small
from rank_job import IN_PIECES, launched

from surgvqa.training import checkpoints

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.model,
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA GPUs"),
]
DEVICE = "cuda"


def test_a_rank_out_of_memory_and_one_that_is_killed_in_the_midst_of_a_pass(tmp_path):
    """Rank 1 runs out of memory in the backward pass of step 2, and is killed in a layer of a later step."""
    world = small.build(tmp_path / "seven", samples=7)
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 50, "checkpointed_layers": 0, "device": DEVICE}
    plan = {"in_layer": [[1, 5, "backward", IN_PIECES], [1, 13, "killed", ""]]}
    run = launched(
        [sys.executable], world, tmp_path / "workspace", plan, gpus="2", shard=True, compile="off", **options
    )
    (oom,) = run.of["oom"]
    assert oom["rank"] == 1 and "trying again with an emptied cache" in oom["action"]
    (plan,) = (event for event in run.of["phase"] if event["name"] == "plan" and "device" in event)
    assert plan["device"] == f"{DEVICE}:0"
    done = [event["step"] for event in run.of["metric"]]
    assert done == list(range(1, len(done) + 1)) and len(done) >= 2
    assert run.code == 1 and "rank 1 of 2: its process is gone" in run.of["error"][0]["text"]
    newest, _ = checkpoints.newest_complete_checkpoint(run.output)
    assert newest.name == f"checkpoint-{done[-1]}"
