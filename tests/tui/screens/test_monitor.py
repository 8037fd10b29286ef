"""The Monitor screen over real run folders."""

import subprocess
import sys

import pytest
from panels import SIZES, die, go, options, panel, settle, text, timeline, training
from places import ROOT
from textual.events import Key
from textual.widgets import OptionList, Static

from surgvqa.errors import UsageError
from surgvqa.runs.folder import Run
from tui.app import Panel
from tui.dialogs.confirm import Confirm
from tui.follow.run_model import RunModel
from tui.screens.monitor import MonitorScreen
from tui.widgets.chart import Chart
from tui.widgets.search import Search
from tui.widgets.timeline_view import TimelineView


@pytest.mark.parametrize("size", SIZES)
async def test_a_started_panel_attaches_to_the_newest_running_run(root, size):
    with training(root, name="old"):
        pass
    run = training(root, name="live")
    for step in (31, 32):  # and again after a restart: nothing is in the panel's memory alone
        await check_attached(panel(root), run, step, size)


async def check_attached(app: Panel, run: Run, step: int, size) -> None:
    async with app.run_test(size=size) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        await settle(pilot, lambda: app.screen.follower.model.train.xs)
        assert app.screen.follower.run_id == run.id
        await settle(pilot, lambda: f"{step - 1}/100" in text(app, "#facts"))
        facts = text(app, "#facts")
        assert "running" in facts and "2.5 samples/s" in facts
        gauge = text(app, "#gauge")
        assert "no GPU" in gauge and "host memory" in gauge and "1.5 GB of 28.5 GB budget" in gauge
        assert "eval 0.75" in text(app, "#legend")
        assert "engine text [/x] is no markup" in timeline(app)
        run.emit("metric", step=step, total_steps=100, loss=0.05)
        await settle(pilot, lambda: app.screen.query_one(Chart).series[0].xs[-1] == step)


async def test_a_run_that_has_ended_is_drawn_anew_at_another_width(root):
    with training(root):
        pass
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await pilot.press("4")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        await settle(pilot, lambda: len(text(app, "#facts").splitlines()) > 3)
        await pilot.resize_terminal(80, 24)
        await settle(pilot, lambda: len(text(app, "#facts").splitlines()) == 2)
        assert len(text(app, "#gauge").splitlines()) == 2
        await settle(pilot, lambda: app.focused is None)  # there is no room for the run list
        await pilot.resize_terminal(120, 36)
        await settle(pilot, lambda: isinstance(app.focused, OptionList))


async def test_runs_of_one_name_are_told_apart(root):
    ids = []
    for _ in range(2):
        with training(root, name="a name that is long") as run:
            ids.append(run.id)
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await pilot.press("4")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        options = app.screen.query_one("#runs", OptionList)
        await settle(pilot, lambda: options.option_count == 2)
        for run_id in ids:
            row = str(options.get_option(run_id).prompt)
            assert "a name that is long " + run_id[-3:] in row and max(map(len, row.splitlines())) <= 38
        await pilot.resize_terminal(80, 24)
        await settle(pilot, lambda: "a name that is long" in str(app.screen.query_one("#chart-panel").border_title))


@pytest.mark.parametrize("size", SIZES)
async def test_a_run_without_a_loss_is_not_said_to_be_none(root, size):
    Run.create(root / "runs", "train", options=options(run_name="first")).phase("encode", "frames")
    app = panel(root)
    async with app.run_test(size=size) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and "encode" in text(app, "#facts"))
        await settle(pilot, lambda: app.screen.query_one(Chart).empty.startswith("The first loss comes"))


async def test_a_line_that_the_process_writes_joins_the_timeline(root):
    run = training(root)
    (run.folder / "log.txt").write_text("")
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen))
        await settle(pilot, lambda: timeline(app))  # the first look is over: what comes now has a time
        (run.folder / "log.txt").write_text("a word\n")
        await settle(pilot, lambda: timeline(app)[-1:] == ["a word"])


async def test_another_run_is_attached_from_the_list(root):
    with training(root, name="old"):
        pass
    run = training(root, name="live")
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.query_one(OptionList).options)
        assert app.screen.follower.run_id == run.id
        await pilot.press("down", "enter")
        await settle(pilot, lambda: app.screen.follower.run_id != run.id)
        await settle(pilot, lambda: "finished" in text(app, "#facts"))
        assert app.screen.check_action("evaluate", ()) and not app.screen.check_action("stop", ())


async def test_a_dead_run_says_why_and_what_to_do(root):
    run = training(root)
    run.emit("checkpoint", step=20, path="checkpoint-20")
    die(run)
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await pilot.press("4")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        await settle(pilot, lambda: "died" in text(app, "#facts"))
        facts = text(app, "#facts")
        assert "engine text [/x] is no markup" in facts and "c continues from the last checkpoint" in facts
        assert app.screen.check_action("resume", ())


async def test_a_failed_run_shows_its_error(root):
    run = training(root)
    with pytest.raises(UsageError), run:
        raise UsageError("train.jsonl:17: no field video_id")
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await pilot.press("4")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        await settle(pilot, lambda: "train.jsonl:17: no field video_id" in text(app, "#facts"))


@pytest.mark.parametrize("size", SIZES)
async def test_the_whole_error_is_on_the_screen(root, size):
    """What to do stands at the end of it."""
    run = training(root)
    with pytest.raises(UsageError), run:
        raise UsageError("/a/long/path/of/a/file.jsonl:17: " + "found this, expected that, " * 6 + "then-do-this")
    app = panel(root)
    async with app.run_test(size=size) as pilot:
        await pilot.press("4")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and "then-do-this" in text(app, "#facts"))
        await settle(pilot, lambda: "then-do-this" in app.export_screenshot() and "starts" in app.export_screenshot())


@pytest.mark.parametrize("size", SIZES)
async def test_the_gauge_tells_tensors_from_what_is_cached_and_from_the_driver(root, size):
    run = Run.create(root / "runs", "train", options=options(run_name="first", budget_gb=28.5))
    run.emit("gpu", device=0, backend="cuda", process_bytes=26.9e9, allocated_bytes=20e9, reserved_bytes=26e9,
             total_bytes=85e9)  # fmt: skip
    app = panel(root)
    async with app.run_test(size=size) as pilot:
        await pilot.press("4")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        await settle(pilot, lambda: "26.9 GB of 28.5 GB budget" in text(app, "#gauge"))
        content = app.screen.query_one("#gauge", Static).content
        spans = {str(span.style): span.end - span.start for span in content.spans}
        assert {"$secondary", "$warning"} <= set(spans)  # two colours in the bar: close to the budget, and cached
        assert ("█tensors 20.0 █cached 6.0 █CUDA 0.9" in content.plain) == (size[0] >= 120)
        assert max(map(len, content.plain.splitlines())) <= app.screen.query_one("#gauge").size.width


def test_the_screenshot_is_of_the_newest_training(root, tmp_path):
    with training(root, name="the curve"):
        pass
    with Run.create(root / "runs", "evaluate", run_id="99991231-235959-evaluate-fff"):
        pass
    drawn = tmp_path / "panel.svg"
    script = ROOT / "docs/screenshot.py"
    subprocess.run([sys.executable, script, root, drawn, "--wait", "0.3"], check=True, timeout=120)
    assert "the&#160;curve" in drawn.read_text() and "step&#160;30/100" in drawn.read_text()


@pytest.mark.parametrize("size", SIZES)
async def test_the_gauge_names_every_gpu_and_who_holds_it(root, size):
    """What a run on the first of three GPUs writes, its prediction too."""
    run = Run.create(root / "runs", "train", options=options(run_name="first", budget_gb=28.5))
    run.emit("phase", name="plan", text="…", fit="2 of 28 layers recomputed (the fewest that fit: 28.2 of 28.5 GB)",
             predicted={"language model": 13e9, "kept": 9e9, "a": 2e9, "b": 1e9, "c": 1})  # fmt: skip
    run.emit(
        "gpu", device=0, backend="cuda", name="NVIDIA H100", process_bytes=26.9e9, peak_bytes=28.1e9, total_bytes=85e9,
        others=[{"pid": 77, "used_bytes": 3.3e9, "name": "jupyter-lab"}],
        other_gpus=[
            {"index": "1", "used_bytes": 71e9, "total_bytes": 85e9, "processes": [{"pid": 5, "name": "vllm"}]},
            {"index": "2.1"},
        ],
    )  # fmt: skip
    app = panel(root)
    async with app.run_test(size=size) as pilot:
        await pilot.press("4")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        await settle(pilot, lambda: "GPU 2.1" in text(app, "#gauge"))
        drawn = text(app, "#gauge")
        lines = drawn.splitlines()
        drawn_to_width = [line for line in lines if "recomputed" not in line]  # that one wraps
        assert max(map(len, drawn_to_width)) <= app.screen.query_one("#gauge").size.width
        assert "26.9 GB of 28.5 GB budget" in drawn and "headroom 0.4 GB" in drawn and "memory unknown" in drawn
        (first,) = [line for line in lines if line.startswith("GPU 1 ")]
        assert first.count("█") >= 4 * first.count("━") > 0 and "71.0 GB of 85.0 GB" in first
        wide = size[0] >= 120
        for words in ("others: jupyter-lab 3.3 GB", "vllm", "predicted peak 25.0 GB", "language model", "the rest",
                      "2 of 28 layers recomputed (the fewest that fit"):  # fmt: skip
            assert (words in drawn) == wide
        live = next(line for line in lines if "█" in line)
        assert 0.85 < live.count("█") / live.index("┃") <= 1  # used, then peak or budget


@pytest.mark.parametrize("size", SIZES)
async def test_one_key_goes_on_as_an_out_of_memory_error_proposes(root, monkeypatch, size):
    run = training(root)
    run.emit("oom", step=30, phase="evaluate", text="tried to allocate", next_preset="small",
             next_settings={"num_frames": 6, "gradient_checkpointing": True})  # fmt: skip
    with pytest.raises(UsageError), run:
        raise UsageError("out of GPU memory at step 30: tried; go on with preset small: surgvqa train --resume x")
    launched = []

    async def launch(*argv, **_):
        launched.append(argv)
        return run.id

    app = panel(root)
    monkeypatch.setattr(app.session.here, "launch", launch)
    async with app.run_test(size=size) as pilot:
        await pilot.press("4")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        await settle(pilot, lambda: "o goes on from the last checkpoint as in preset small" in text(app, "#facts"))
        assert "step 30: tried" in text(app, "#facts") and "--resume" not in text(app, "#facts")
        await pilot.press("o")
        await settle(pilot, lambda: launched)
        assert launched == [("train", "--resume", run.id, "--num_frames=6", "--gradient_checkpointing=true")]


def test_a_way_on_that_only_costs_time_has_no_preset():
    model = RunModel()
    model.feed([{"kind": "oom", "step": 3, "next_preset": None, "next_settings": {"checkpointed_layers": 28}}])
    assert model.way_on == ("with checkpointed_layers 28", ["--checkpointed_layers=28"])


async def test_an_out_of_memory_error_that_was_survived_proposes_nothing(root):
    run = training(root)
    run.emit("oom", step=30, text="tried to allocate", next_preset="small", next_settings={"num_frames": 6})
    run.emit("metric", step=31, total_steps=100, loss=0.1)
    with pytest.raises(UsageError), run:
        raise UsageError("disk full")
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await pilot.press("4")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        await settle(pilot, lambda: "disk full" in text(app, "#facts"))
        assert not app.screen.check_action("way_on", ())


async def test_a_resumed_run_shows_the_whole_curve(root):
    with training(root, steps=30, name="first") as first:
        pass
    checkpoint = first.folder / "checkpoints" / "checkpoint-20"
    again = Run.create(root / "runs", "train", options=options(resume=str(checkpoint)))
    for step in (21, 22):
        again.emit("metric", step=step, total_steps=100, loss=0.5)
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        await settle(pilot, lambda: app.screen.follower.model.train.xs[-1:].tolist() == [22])
        series = app.screen.follower.model.train
        assert series.xs.tolist() == list(range(1, 23)) and series.ys[20:].tolist() == [0.5, 0.5]


async def test_an_evaluation_is_shown_by_question_type(root):
    run = Run.create(root / "runs", "evaluate")
    with run:
        run.result = {
            "keyword_accuracy": 0.71,
            "by_type": {"tool_presence": {"n": 20, "keyword_accuracy": 0.9, "majority_accuracy": 0.5}},
            "collapsed_types": ["tool_presence"],
        }
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await pilot.press("4")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and "tool_presence" in text(app, "#text"))
        shown = text(app, "#text")
        assert "71.0 %" in shown and "90.0 %" in shown and "almost always the same answer" in shown
        await settle(pilot, lambda: text(app, "#text").count("█") > 20)  # 90 % at the width that the panel has


async def test_chart_keys(root):
    training(root)
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.query_one(Chart).series[0].xs)
        chart = app.screen.query_one(Chart)
        await pilot.press("g", "plus")
        assert chart.logarithmic and chart.window is not None
        before = chart.window
        await pilot.press("comma")
        assert chart.window[0] < before[0]
        await pilot.press("0")
        assert chart.window is None
        await pilot.press("left", "left")
        assert chart.cursor == 29
        legend = text(app, "#legend")
        assert "step 29" in legend and "train 0.103448" in legend and "eval 0.75 at 30" in legend
        await pilot.press("m")  # accuracy and gradient norm have no points
        assert str(app.screen.query_one("#chart-panel-3").border_title) == "learning rate"
        assert app.screen.query_one("#chart-panel-3").display and not app.screen.query_one("#chart-panel").display
        await pilot.press("m", "m", "m")
        assert app.screen.query_one("#chart-panel").display


async def test_the_log_counts_what_came_while_one_reads_above(root):
    run = training(root)
    (run.folder / "log.txt").write_text("".join(f"line {i}\n" for i in range(500)))
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and len(timeline(app)) >= 500)
        log = app.screen.query_one(TimelineView)
        await settle(pilot, lambda: log.max_scroll_y > 0 and log.is_vertical_scroll_end)

        def stays_at_the_top() -> bool:
            """Scrolls again, as a user would, where a scroll to the end was under way and came after it."""
            stayed = log.scroll_offset.y == 0 and not log.following
            log.scroll_home(animate=False, immediate=True)
            return stayed

        await settle(pilot, stays_at_the_top)
        with open(run.folder / "log.txt", "a") as file:
            file.write("one more\nand one\nhalf a li")
        await settle(pilot, lambda: log.unseen == 2)
        assert log.scroll_offset.y == 0
        await pilot.press("t")
        await settle(pilot, lambda: log.is_vertical_scroll_end)
        assert log.unseen == 0


async def test_the_search_of_the_log_is_left_by_enter_or_escape(root):
    training(root)
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and timeline(app))
        for key, said in (("escape", ""), ("enter", "1 with 'markup'")):
            await pilot.press("i")
            for typed in ("slash", *"markup"):  # at once, as over a slow line
                app.post_message(Key(typed, typed if len(typed) == 1 else None))
            field = app.screen.query_one("#timeline-search", Search)
            await settle(pilot, lambda field=field: field.value == "markup" and field.has_focus)
            shown = [
                active.binding.description for active in app.screen.active_bindings.values() if active.binding.show
            ]
            assert "cancel" in shown and "zoom" not in shown
            await pilot.press(key)
            await settle(pilot, lambda field=field: not field.display and app.screen.query_one(TimelineView).has_focus)
            assert said in text(app, "#notice") and app.is_running
            field.value = ""


async def test_stop_asks_first(root, monkeypatch):
    run = training(root)
    stopped = []
    app = panel(root)
    monkeypatch.setattr(app.session.target, "stop", lambda run_id: stopped.append(run_id) or "stopped")
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower.active)
        await settle(pilot, lambda: app.screen.follower.model.events > 0)
        await pilot.press("s")
        await settle(pilot, lambda: isinstance(app.screen, Confirm))
        await pilot.press("n")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen))
        assert not stopped
        await pilot.press("s", "y")
        await settle(pilot, lambda: stopped == [run.id])


async def test_an_unforeseen_error_is_said_and_the_panel_goes_on(root, monkeypatch):
    training(root)
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen))
        monkeypatch.setattr(app.session.target, "runs", lambda: 1 / 0)
        await settle(pilot, lambda: "ZeroDivisionError" in text(app, "#notice"))
        await go(app, pilot, "train")
        assert app.is_running
