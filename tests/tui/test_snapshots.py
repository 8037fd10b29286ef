"""Every screen as a picture, at both sizes: what is drawn is compared with what was looked at and accepted.

After a change that is meant: `pytest tests/tui/test_snapshots.py --snapshot-update`, and look at the new pictures.
"""

import json
import math
import time

import pytest
from panels import SIZES, die, go, options, panel, settle, text

from surgvqa.machine import gpu
from surgvqa.runs.folder import Run
from tui.dialogs.help import Help
from tui.screens.compare import CompareScreen
from tui.widgets.chart import Chart
from tui.widgets.run_list import RunList

NOON = 1_796_040_000.0
LACK = "tried to allocate 2.1 GB"
PREDICTED = {"language model": 15.2e9, "kept activations": 7.1e9, "vision encoder": 1.4e9, "optimiser": 0.6e9}
H100 = {"device": 0, "backend": "cuda", "name": "NVIDIA H100 80GB HBM3", "total_bytes": 85.5e9}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder whose path, times and GPU are the same everywhere."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.setattr(time, "time", lambda: NOON)
    monkeypatch.setattr(gpu, "any_gpu", lambda: True)
    root = tmp_path / "colon"
    root.mkdir()
    (root / "surgvqa.toml").write_text('preset = "baseline-8f-512px"\nbudget_gb = 28.5\n')
    yield root
    monkeypatch.undo()
    time.tzset()


def run(root, number: int, command: str = "train", ago: float = 600.0, **settings) -> Run:
    """A run folder with a fixed name, begun `ago` seconds before noon."""
    made = Run.create(root / "runs", command, run_id=f"20261130-1150{number:02d}-{command}-{number:03d}",
                      options=options(budget_gb=28.5, **settings), preset="baseline-8f-512px")  # fmt: skip
    info = json.loads((made.folder / "run.json").read_text())
    (made.folder / "run.json").write_text(json.dumps({**info, "started": NOON - ago}))
    return made


def write(run: Run, events: list[dict]) -> None:
    """Events with times of their own."""
    with open(run.folder / "events.jsonl", "a") as file:
        file.writelines(json.dumps({"v": 1, **event}) + "\n" for event in events)


def steps(first: int, last: int, began: float, of: int = 200) -> list[dict]:
    """One step in two seconds, with a loss that falls and jumps."""
    return [
        {"t": began + 2 * step, "kind": "metric", "step": step, "total_steps": of, "samples_per_s": 4.0,
         "loss": round(0.4 + 2.6 / (1 + step / 12) + 0.12 * math.sin(step * 2.4), 4),
         "learning_rate": 1e-4 * min(1, step / 20)}
        for step in range(first, last + 1)
    ]  # fmt: skip


def a_training(root) -> Run:
    began = NOON - 260
    live = run(root, 3, run_name="colon-8f", ago=280)
    gpu_event = {"kind": "gpu", **H100, "process_bytes": 25.9e9, "allocated_bytes": 21.2e9, "reserved_bytes": 25.1e9,
                 "peak_bytes": 26.8e9, "utilization_percent": 97, "temperature_c": 61, "power_w": 612.0}  # fmt: skip
    write(live, [
        {"t": NOON - 279, "kind": "phase", "name": "load model", "text": "merged"},
        {"t": began, "kind": "phase", "name": "train", "text": "200 steps", "predicted": PREDICTED},
        *steps(1, 60, began),
        {"t": began + 121, "kind": "eval", "step": 60, "eval_loss": 0.92},
        {"t": began + 121, "kind": "checkpoint", "step": 60, "path": "checkpoints/checkpoint-60"},
        *steps(61, 120, began),
        {"t": began + 241, "kind": "eval", "step": 120, "eval_loss": 0.71},
        {"t": began + 241, "kind": "checkpoint", "step": 120, "path": "checkpoints/checkpoint-120"},
        *steps(121, 125, began),
        {"t": NOON - 1, **gpu_event},
    ])  # fmt: skip
    (live.folder / "log.txt").write_text("loading merged\n192 samples, 8 frames each\n")
    return live


def on_two_hosts(root) -> None:
    """Two cards on each of two hosts, the last of which is the slowest; on the second host a third card has another
    user."""
    began = NOON - 260
    live = run(root, 4, run_name="colon-8f", ago=280)
    other = {"index": 2, "name": H100["name"], "used_bytes": 61e9, "total_bytes": 85.5e9}
    write(live, [{"t": NOON - 279, "kind": "ranks", "hosts": ["lambda-1", "lambda-1", "lambda-2", "lambda-2"]},
                 {"t": began, "kind": "phase", "name": "train", "text": "200 steps", "predicted": PREDICTED},
                 *({**step, "rank_wait": [0.14, 0.15, 0.13, 0.0]} for step in steps(1, 125, began))])  # fmt: skip
    for rank, used in enumerate((25.9e9, 25.8e9, 25.9e9, 27.4e9)):
        cards = [{"index": index, "used_bytes": 25e9, "total_bytes": 85.5e9} for index in (0, 1) if index != rank % 2]
        write(live, [{"t": NOON - 1, "kind": "gpu", **H100, "device": rank % 2, "rank": rank, "process_bytes": used,
                      "allocated_bytes": used - 4e9, "reserved_bytes": used - 0.8e9, "peak_bytes": used + 0.9e9,
                      "utilization_percent": 97 - 12 * (rank < 3),
                      "other_gpus": cards + [other] * (rank > 1)}])  # fmt: skip


def an_evaluation(root) -> None:
    types = {"tool presence": (0.91, 0.62), "phase": (0.74, 0.41), "location": (0.66, 0.7)}
    by_type = {name: {"n": 40, "keyword_accuracy": a, "majority_accuracy": b} for name, (a, b) in types.items()}
    done = run(root, 2, "evaluate", 3600, checkpoint="runs/20261130-115003-train-003", eval_data_path="eval.jsonl")
    result = {"keyword_accuracy": 0.77, "majority_accuracy": 0.58, "by_type": by_type, "samples": 120}
    write(done, [{"t": NOON - 3000, "kind": "finished", "state": "finished", "exit_code": 0, "result": result}])


def out_of_memory(root) -> None:
    failed = run(root, 1, run_name="ablation [no audio]", ago=7200)
    settings = {"num_frames": 6, "image_size": 384}
    write(failed, [*steps(1, 40, NOON - 7100),
                   {"t": NOON - 7000, "kind": "checkpoint", "step": 40, "path": "checkpoints/checkpoint-40"},
                   {"t": NOON - 6990, "kind": "oom", "step": 41, "phase": "backward", "text": LACK,
                    "next_preset": "oom-6f-384px", "next_settings": settings},
                   {"t": NOON - 6990, "kind": "error", "text": f"out of GPU memory at step 41: {LACK}"},
                   {"t": NOON - 6989, "kind": "finished", "state": "failed", "exit_code": 1}])  # fmt: skip
    died = run(root, 0, run_name="killed", ago=9000)
    write(died, steps(1, 10, NOON - 8990))
    die(died)


def everything(root) -> None:
    out_of_memory(root)
    an_evaluation(root)
    a_training(root)


def a_sample(root) -> None:
    """One sample with two frames, a red and a striped one, and its recording."""
    frames = root / "frames" / "v"
    frames.mkdir(parents=True)
    (root / "audio").mkdir()
    (root / "audio" / "q1.wav").touch()
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (80, 60), (170, 40, 50)).save(frames / "v_10.png")
    striped = image.new("RGB", (80, 60), (60, 90, 60))
    striped.paste((220, 220, 200), (20, 0, 40, 60))
    striped.save(frames / "v_11.png")
    row = {"id": "q1", "video_id": "v", "frames": ["v_10", "v_11"], "question": "Which way does the tool move?",
           "question_type": "motion", "answer": "It moves to the right.", "short_answer": "right"}  # fmt: skip
    (root / "eval.jsonl").write_text(json.dumps(row) + "\n")
    (root / "surgvqa.toml").write_text(
        'eval_data_path = "eval.jsonl"\nframes_dir = "frames"\naudio_dir = "audio"\n[train]\nmodel_name_or_path = "m"\n'
    )


async def drawn(pilot, condition) -> None:
    """Waits for a condition, and then until another second's look at everything changes nothing in the picture."""
    await settle(pilot, condition)
    before, app = None, pilot.app
    while (now := [list(strip) for strip in app.screen._compositor.render_strips()]) != before:
        before = now
        await app._refresh()
        await app.workers.wait_for_complete()
        await pilot.pause()


@pytest.mark.parametrize("size", SIZES, ids=["80x24", "120x36"])
class TestPictures:
    def test_monitor(self, snap_compare, workspace, size):
        everything(workspace)
        app = panel(workspace)

        async def look(pilot):
            await go(app, pilot, "monitor")
            await drawn(pilot, lambda: "125/200" in text(app, "#facts") and "25.9 GB" in text(app, "#gauge"))

        assert snap_compare(app, terminal_size=size, run_before=look)

    def test_monitor_of_a_run_on_two_hosts(self, snap_compare, workspace, size):
        on_two_hosts(workspace)
        app = panel(workspace)

        async def look(pilot):
            await go(app, pilot, "monitor")
            await drawn(pilot, lambda: "125/200" in text(app, "#facts") and "lambda-2" in text(app, "#gauge"))

        assert snap_compare(app, terminal_size=size, run_before=look)

    def test_monitor_after_an_out_of_memory_error(self, snap_compare, workspace, size):
        out_of_memory(workspace)
        app = panel(workspace)

        async def look(pilot):
            await go(app, pilot, "monitor")
            chart = app.screen.query_one(Chart)
            await drawn(pilot, lambda: "oom-6f-384px" in text(app, "#facts") and chart.series[0].xs)

        assert snap_compare(app, terminal_size=size, run_before=look)

    def test_monitor_of_an_evaluation(self, snap_compare, workspace, size):
        an_evaluation(workspace)
        app = panel(workspace)

        async def look(pilot):
            await go(app, pilot, "monitor")
            await drawn(pilot, lambda: "location" in text(app, "#text"))

        assert snap_compare(app, terminal_size=size, run_before=look)

    def test_train(self, snap_compare, workspace, size):
        app = panel(workspace)

        async def look(pilot):
            await go(app, pilot, "train")
            await drawn(pilot, lambda: "predicted of 28.5 GB" in text(app, "#memory"))

        assert snap_compare(app, terminal_size=size, run_before=look)

    def test_train_with_a_preset_looked_at(self, snap_compare, workspace, size):
        app = panel(workspace)

        async def look(pilot):
            await go(app, pilot, "train")
            await settle(pilot, lambda: "predicted of 28.5 GB" in text(app, "#memory"))
            await pilot.press("f8")
            await drawn(pilot, lambda: "would change" in text(app, "#presets"))

        assert snap_compare(app, terminal_size=size, run_before=look)

    def test_merge_and_its_help(self, snap_compare, workspace, size):
        app = panel(workspace)

        async def look(pilot):
            await go(app, pilot, "merge")
            await settle(pilot, lambda: "Choose the" in text(app, "#merge-text"))
            await pilot.press("question_mark")
            await drawn(
                pilot,
                lambda: (
                    isinstance(app.screen, Help) and any(dialog.region.width for dialog in app.screen.query(".dialog"))
                ),
            )

        assert snap_compare(app, terminal_size=size, run_before=look)

    def test_upload(self, snap_compare, workspace, size):
        app = panel(workspace)

        async def look(pilot):
            await go(app, pilot, "upload")
            await drawn(pilot, lambda: "Nothing to send" in text(app, "#plan-text"))

        assert snap_compare(app, terminal_size=size, run_before=look)

    def test_ask(self, snap_compare, workspace, size):
        a_sample(workspace)
        app = panel(workspace)

        async def look(pilot):
            await go(app, pilot, "ask")
            await drawn(pilot, lambda: "▀" in text(app, "#clip") and "Which way" in text(app, "#ask-answer"))

        assert snap_compare(app, terminal_size=size, run_before=look)

    def test_two_runs_compared(self, snap_compare, workspace, size):
        everything(workspace)
        app = panel(workspace)

        async def look(pilot):
            await go(app, pilot, "monitor")
            await settle(pilot, lambda: "125/200" in text(app, "#facts"))
            app.screen.query_one(RunList).marked = ["20261130-115003-train-003", "20261130-115001-train-001"]
            await pilot.press("d")
            await settle(pilot, lambda: isinstance(app.screen, CompareScreen))
            await drawn(pilot, lambda: len([s for s in app.screen.query_one(Chart).series if s.xs]) == 3)

        assert snap_compare(app, terminal_size=size, run_before=look)
