"""Two ranks (gloo, on the CPU) train as one process does with twice the accumulation, whatever happens to one of them.

Two launches of torchrun are shared by all that is asked of them here: importing torch four times is what they cost.
"""

import json
import sys
from pathlib import Path

import pytest
import small
from rank_job import IN_PIECES, launched
from watched import Watched, assert_same_adapter

from surgvqa.model.sizes import checkpoint_sizes
from surgvqa.training import checkpoints, results

pytestmark = [pytest.mark.model, pytest.mark.slow]

SEVEN = 7
"""Training samples: the last step of an epoch has three, of which one rank has one and the other two."""
SHARED = {
    "max_steps": 5,
    "lora_dropout": 0.0,
    "learning_rate": 0.01,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 1,
    "save_strategy": "steps",
    "load_best_model_at_end": False,
    "save_total_limit": 9,
    "per_device_eval_batch_size": 3,
    "checkpointed_layers": 0,
}
CLOSE = {"rel": 1e-5}


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    return small.build(tmp_path_factory.mktemp("seven"), samples=SEVEN)


@pytest.fixture(scope="module")
def alone(seven, tmp_path_factory):
    """One process, four samples a step."""
    options = seven.train_options(eval_data_path=str(seven.eval), gradient_accumulation_steps=4, **SHARED)
    run = Watched(options, tmp_path_factory.mktemp("alone") / "runs")
    assert run.error is None
    return run


def losses(events: list[dict]) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events}


@pytest.fixture(scope="module")
def stopped(seven, tmp_path_factory):
    """`surgvqa train --gpus 2`: memory runs out on rank 1 alone, in step 2; rank 1 alone is
    asked to stop at step 3."""
    folder = tmp_path_factory.mktemp("stopped") / "workspace"
    plan = {"out_of_memory": [1, 3], "stop": [1, 3]}
    return launched([sys.executable], seven, folder, plan, **SHARED, gpus="2", gradient_accumulation_steps=2)


def test_two_ranks_train_as_one_process_and_step_down_and_stop_together(alone, stopped):
    assert stopped.code == 0, stopped.err
    assert json.loads(stopped.out)["state"] == "stopped"  # said once
    assert losses(stopped.of["metric"]) == pytest.approx({n: alone.losses()[n] for n in (1, 2, 3)}, **CLOSE)
    assert [event["grad_norm"] for event in stopped.of["metric"]] == pytest.approx(
        [event["grad_norm"] for event in alone.of("metric")[:3]], rel=1e-4
    )
    (evaluated,) = stopped.of["eval"]
    before = alone.of("eval")[0]
    assert evaluated["eval_loss"] == pytest.approx(before["eval_loss"], **CLOSE)
    assert evaluated["loss_by_type"] == pytest.approx(before["loss_by_type"], **CLOSE)
    (encoded,) = (event for event in stopped.of["phase"] if event["name"] == "encoded")
    assert encoded["encoded"] == next(e["encoded"] for e in alone.of("phase") if e["name"] == "encoded")
    (event,) = stopped.of["oom"]
    assert event["rank"] == 1 and event["step"] == 1 and "all layers recompute" in event["action"]
    (change,) = stopped.of["retreat"]
    assert change["settings"]["checkpointed_layers"] == results.read(stopped.output).options["checkpointed_layers"] == 2
    assert {event.get("rank", 0) for event in stopped.of["gpu"]} == {0, 1}
    assert checkpoints.checkpoints(stopped.output)[0].name == "checkpoint-3"
    assert (stopped.run / "log-rank-1.txt").is_file()


def test_what_two_ranks_have_begun_one_process_ends(alone, stopped, seven):
    found = results.read(stopped.output).options
    assert (found["gpus"], found["gradient_accumulation_steps"]) == ("2", 2)
    options = seven.train_options(**found | {"resume": str(stopped.output), "gpus": "1"})
    run = Watched(options, stopped.run.parent)
    assert run.error is None and results.read(run.output).options["gradient_accumulation_steps"] == 4
    (said,) = run.of("warning")
    assert "gpus is 1, but was 2: gradient_accumulation_steps is now 4" in said["text"]
    assert run.losses() == pytest.approx({n: alone.losses()[n] for n in (4, 5)}, **CLOSE)
    assert_same_adapter(run.output, alone.output, rtol=1e-3, atol=1e-3)  # Adam steps by rounding, too


def test_what_one_process_has_begun_two_ranks_end_until_one_is_killed(alone, seven, tmp_path):
    """torchrun by hand; rank 1 is killed as step 4 ends."""
    program = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node=2"]
    changes = {"resume": str(alone.output / "checkpoint-2"), "output_dir": str(tmp_path / "output")}
    run = launched(program, seven, tmp_path / "workspace", {"kill": [1, 4]}, **changes)
    assert run.code == 1
    assert losses(run.of["metric"]) == pytest.approx({n: alone.losses()[n] for n in (3, 4)}, **CLOSE)
    assert "rank 1 of 2" in run.of["error"][0]["text"] and len(run.of["error"]) == 1
    assert [event["state"] for event in run.of["finished"]] == ["failed"]
    newest, skipped = checkpoints.newest_complete_checkpoint(run.output)
    assert newest.name == "checkpoint-4" and not skipped
    assert "surgvqa train: rank 1 of 2" in run.err


@pytest.fixture(scope="module")
def divided(seven, tmp_path_factory):
    """`--shard`. On rank 1 alone memory runs out: at the first gathers of step 1, between two layers of step 2's
    backward pass, and in its last layer when it is repeated. That rank has fewer samples in step 2."""
    folder = tmp_path_factory.mktemp("divided") / "workspace"
    errors = [[1, 1, "forward", IN_PIECES], [1, 6, "backward", IN_PIECES], [1, 9, "forward", ""]]
    plan = {"in_layer": errors, "stop": [1, 3]}
    return launched(
        [sys.executable], seven, folder, plan, **SHARED, gpus="2", shard=True, gradient_accumulation_steps=2
    )


def test_ranks_that_share_a_model_train_as_one_process_and_step_down_together(alone, stopped, divided, seven):
    assert divided.code == 0, divided.err
    assert losses(divided.of["metric"]) == pytest.approx({n: alone.losses()[n] for n in (1, 2, 3)}, **CLOSE)
    (evaluated,), before = divided.of["eval"], alone.of("eval")[0]
    assert evaluated["eval_loss"] == pytest.approx(before["eval_loss"], **CLOSE)
    assert evaluated["loss_by_type"] == pytest.approx(before["loss_by_type"], **CLOSE)
    (answered,) = divided.of["answers"]
    assert answered["samples"] == 4 and answered["by_type"] == stopped.of["answers"][0]["by_type"]
    again = "free memory is fragmented: trying again with an emptied cache"
    assert [event["action"] for event in divided.of["oom"]] == [again, again, "continuing with all layers recompute"]
    assert {event["rank"] for event in divided.of["oom"]} == {1}
    (plan,) = (event for event in divided.of["phase"] if event["name"] == "plan" and "parameters" in event)
    norm = small.SIZES.hidden_size  # the last one is on every rank
    half = (sum(checkpoint_sizes(seven.checkpoint)[1]["lm"]) - norm) // 2 // 2  # of a layer; there are two
    frozen = plan["parameters"] - plan["trained_parameters"]
    for event in divided.of["oom"]:  # one layer is gathered, and of the other there is half
        assert event["memory"]["frozen weights"] == 4 * (frozen - half)


def test_what_ranks_with_parts_of_a_model_have_begun_one_with_the_whole_ends(alone, divided, seven):
    found = results.read(divided.output).options
    assert found["shard"] and found["checkpointed_layers"] == 2
    options = seven.train_options(**found | {"resume": str(divided.output), "gpus": "1"})
    run = Watched(options, divided.run.parent)
    assert run.error is None
    assert run.losses() == pytest.approx({n: alone.losses()[n] for n in (4, 5)}, **CLOSE)
    assert any("shard: there is one GPU only" in said["text"] for said in run.of("warning"))
