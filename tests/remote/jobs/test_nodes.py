"""One training on two hosts, CPU ranks (gloo): launched, stopped, resumed, until the link between them goes."""

import pytest
from two_hosts import two_hosts  # noqa: F401
from waiting import until

from surgvqa.runs.events import EventTail
from surgvqa.training import checkpoints
from surgvqa.training.carry import CARRIED

pytestmark = [pytest.mark.slow, pytest.mark.model]

TRAIN = {
    "model_name_or_path": "checkpoint", "train_data_path": "train.jsonl", "eval_data_path": "eval.jsonl",
    "frames_dir": "frames", "audio_dir": "audio", "device": "cpu", "num_frames": 2, "image_size": 84, "lora_r": 4,
    "lora_dropout": 0.0, "gradient_accumulation_steps": 2, "max_steps": 400, "save_strategy": "steps", "save_steps": 2,
    "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 2,
}  # fmt: skip
WORDS = [word for name, value in TRAIN.items() for word in (f"--{name}", str(value))]


def events(folder) -> list[dict]:
    return EventTail(folder / "events.jsonl").read() if (folder / "events.jsonl").exists() else []


def of(kind: str, folder) -> list[dict]:
    return [event for event in events(folder) if event["kind"] == kind]


@pytest.fixture(scope="module")
def stopped(two_hosts):  # noqa: F811
    """A run that was stopped after its fourth step; its answers to launch and stop, and its folders."""
    launched = two_hosts.here("launch", "one,two", "train", *WORDS)
    folders = [there / "runs" / name for there, name in zip(two_hosts.theres, launched["runs"])]
    until(lambda: len(of("metric", folders[0])) >= 4 or of("finished", folders[0]), 300)
    return launched, two_hosts.here("stop", "one,two", "last"), folders


def test_a_stop_ends_all_and_the_first_host_has_all_events(stopped):
    launched, answer, (first, second) = stopped
    assert launched["hosts"] == ["one", "two"] and second.name == f"{first.name}-node1"
    assert answer["states"] == {"one": "stopped", "two": "stopped"}
    assert of("ranks", first)[0]["hosts"] == ["one", "two"]
    for kind in ("gpu", "memory"):
        assert {event.get("rank", 0) for event in of(kind, first)} == {0, 1}
        assert {event["rank"] for event in of(kind, second)} == {1}
    assert not of("metric", second) and len(of("metric", first)[0]["rank_wait"]) == 2
    assert [event["state"] for folder in (first, second) for event in of("finished", folder)] == ["stopped"] * 2
    plan = next(event for event in of("phase", first) if "ranks" in event)
    assert plan["ranks"] == 2 and "4 samples, on 2 ranks" in plan["text"]
    (encoded,) = (event for event in of("phase", first) if event["name"] == "encoded")
    assert encoded["encoded"] > 0 and encoded["reused"] == 0  # each host has its own cache, whole


def test_fetch_brings_the_folders_of_all_hosts_into_one(stopped, two_hosts):  # noqa: F811
    first, second = stopped[2]
    fetched = two_hosts.here("fetch", "one,two", "last")
    assert (two_hosts.workspace / "runs" / first.name / second.name / "log.txt").is_file()
    assert fetched["folder"].endswith(first.name)


def test_hosts_that_differ_are_refused_and_the_file_is_named(stopped, two_hosts, capsys):  # noqa: F811
    frame = next((two_hosts.theres[1] / "frames").rglob("*.jpg"))
    content = frame.read_bytes()
    frame.write_bytes(content + b"x")
    done = two_hosts.command("launch", "one,two", "train", *WORDS, check=1)
    assert f"frames: not the same on one and two (v1/{frame.name} differs)" in done.stderr
    frame.unlink()
    done = two_hosts.command("launch", "one,two", "train", *WORDS, check=1)
    assert f"(v1/{frame.name} is missing on two)" in done.stderr
    frame.write_bytes(content)
    assert len(list((two_hosts.theres[0] / "runs").iterdir())) == 1
    two_hosts.command("launch", "one,one", "train", *WORDS, check=2)
    two_hosts.command("launch", "one,two", "evaluate", check=2)


def test_a_resumed_run_goes_on_until_a_host_is_lost(stopped, two_hosts):  # noqa: F811
    """The saved state lies on the first host alone. Then the link between the hosts goes without a word."""
    launched = two_hosts.here("resume", "one,two", "last")
    first, second = (there / "runs" / name for there, name in zip(two_hosts.theres, launched["runs"]))
    last = of("metric", stopped[2][0])[-1]["step"]
    until(lambda: len(of("metric", first)) >= 3 or of("finished", first), 300)
    assert of("metric", first)[0]["step"] == last + 1
    copies = list((second / CARRIED).iterdir())
    assert [copy.name for copy in copies] == [f"checkpoint-{last}"] and not checkpoints.damage_of(copies[0])
    two_hosts.cut()
    until(lambda: of("finished", first) and of("finished", second), 60)
    (error,) = of("error", first)
    assert error["text"].startswith("rank 1 of 2 on two: nothing has been heard of it")
    (error,) = of("error", second)
    assert error["text"].startswith("rank 0 of 2 on one: nothing has been heard of it")
    saved = two_hosts.theres[0] / "runs" / stopped[2][0].name / "checkpoints"
    newest, skipped = checkpoints.newest_complete_checkpoint(saved)
    assert newest.name == f"checkpoint-{of('metric', first)[-1]['step']}" and not skipped
    until(lambda: (first / "exit.json").exists() and (second / "exit.json").exists(), 60)  # and nobody hangs
