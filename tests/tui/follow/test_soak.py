"""A long run in fast-forward: memory does not grow with what was written, and no event or line stops the reader."""

import json
import random

from surgvqa.config.workspace import load_workspace
from surgvqa.runs import events
from tui.follow import run_model, timeline
from tui.follow.follower import LOG_LINES, Follower
from tui.targets.local import LocalTarget

BROKEN = (b"", b"{", b"\x00\xff\xfe", b"[1, 2]", b'{"kind": 3}', b'{"v":1,"kind":"metric","step":"abc","loss":null}',
          b'{"v":1,"kind":"gpu","device":{}}', b'{"v":1,"kind":"eval","step":1e400}', b"[" * 5000)  # fmt: skip
START = 1_790_000_000.0


def written(step: int, t: float) -> list[dict]:
    """What a training writes about one step."""
    said = [
        {"kind": "metric", "step": step, "total_steps": 100_000, "loss": 1 / step, "learning_rate": 1e-4},
        {"kind": "gpu", "device": 0, "backend": "cuda", "process_bytes": 2e10 + step, "total_bytes": 8e10},
    ]
    if step % 100 == 0:
        said += [{"kind": "eval", "step": step, "eval_loss": 0.5}, {"kind": "warning", "text": f"odd {step}"}]
        said += [{"kind": "checkpoint", "step": step, "path": f"checkpoints/checkpoint-{step}"}]
    return [{"v": 1, "t": t, **event} for event in said]


async def test_a_day_of_a_run_with_all_that_can_happen_to_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "READ_AT_ONCE", 1 << 16)  # a look takes several reads, as of a file of 100 MB
    monkeypatch.setattr(timeline, "KEPT", 200)
    folder = tmp_path / "runs" / "20261201-000000-train-abc"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"v": 1, "id": folder.name, "command": "train", "started": START}))
    follower = Follower(LocalTarget(load_workspace(tmp_path)), folder.name)
    draw, t, step, lines = random.Random(0), START, 0, 0
    for hour in range(24):
        t += draw.choice((3600.0, 3600.0, -7200.0))  # the clock is set back now and then
        with open(folder / "events.jsonl", "ab") as file:
            for _ in range(250):
                step, t = step + 1, t + 1
                for event in written(step, t):
                    file.write(json.dumps(event).encode() + b"\n")
                if draw.random() < 0.05:
                    file.write(draw.choice(BROKEN) + b"\n")
            file.write(b'{"v":1,"kind":"met')  # half a line: the rest comes later
        with open(folder / "log.txt", "ab") as file:
            file.write(b"".join(b"line %d \x1b]52;c;eA==\x07\n" % (lines + i) for i in range(400)))
            lines += 400
        await follower.poll()
        with open(folder / "events.jsonl", "ab") as file:
            file.write(b'ric","step":%d,"loss":0.25}\n' % step)
        await follower.poll()
        model = follower.model
        assert model.step == step and model.train.last() == 0.25, hour
        assert len(model.train.xs) == step and follower.damage
        assert len(follower.timeline.entries) <= 200 and len(follower.log) <= LOG_LINES
        assert max(len(model.warnings), len(model.errors)) <= run_model.KEPT
    assert len(follower.feed.events.problems) <= events.PROBLEMS_KEPT and follower.feed.events.damaged > 100
    (folder / "events.jsonl").write_text(json.dumps(written(1, t)[0]) + "\n")  # another file under the name
    await follower.poll()
    assert follower.model.step == 1 and len(follower.model.train.xs) == 1
