"""The braille chart, the bars and the run model: what is drawn, from numbers alone."""

import math
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgvqa.config.workspace import Workspace
from surgvqa.runs import folder, history
from tui.content.facts import sparkline
from tui.content.memory import memory_bar
from tui.follow.run_model import Device, Progress, RunModel
from tui.follow.series import Mark, Series
from tui.targets.local import LocalTarget
from tui.widgets.canvas import Canvas, Column, decimate, log_ticks, nice_ticks, running_mean, tick_text
from tui.widgets.chart import Chart
from tui.widgets.form import PathSuggester
from tui.words import bar, clip

NAN = float("nan")


# --- decimation ------------------------------------------------------------------------------------------------------


def test_a_spike_survives_decimation():
    xs = list(range(10_000))
    ys = [1.0] * 10_000
    ys[4321], ys[8765] = 9.0, -5.0
    columns = decimate(xs, ys, 0, 9_999, 100)
    assert len(columns) == 100
    assert max(c.high for c in columns) == 9.0 and min(c.low for c in columns) == -5.0
    assert [c.index for c in columns] == list(range(100))


def test_nan_is_a_gap_and_not_a_value():
    columns = decimate([0, 1, 2, 3, 4], [1.0, 2.0, NAN, 4.0, 5.0], 0, 4, 50)
    assert [c.joined for c in columns] == [False, True, False, True]
    assert all(c.low == c.low for c in columns)


def test_a_window_keeps_one_neighbour_on_either_side():
    columns = decimate(list(range(11)), [float(i) for i in range(11)], 4, 6, 21)
    assert [c.first for c in columns] == [3, 4, 5, 6, 7]
    assert columns[0].index < 0 and columns[-1].index > 20


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(2, 80))
def test_decimation_keeps_the_extremes(ys, columns):
    found = decimate(list(range(len(ys))), ys, 0, max(1, len(ys) - 1), columns)
    assert max(c.high for c in found) == max(ys) and min(c.low for c in found) == min(ys)
    assert all(0 <= c.index < columns for c in found)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=200), st.integers(2, 60), st.integers(0, 8))
def test_the_running_mean_is_the_mean_of_the_points_about_it(ys, columns, reach):
    found = decimate(list(range(len(ys))), ys, 0, max(1, len(ys) - 1), columns)
    scale = (columns - 1) / max(1, len(ys) - 1)
    for column in running_mean(found, reach):
        about = [y for x, y in enumerate(ys) if abs(round(x * scale) - column.index) <= reach]
        assert column.low == column.high == pytest.approx(sum(about) / len(about), abs=1e-6)


def test_the_mean_of_a_noisy_series_has_its_cells_for_itself():
    chart = Chart([Series("train", "chart--train", noisy=True)])
    for step in range(2_000):
        chart.series[0].add(step, 1.0 + (step % 2))
    (noise, points), (mean, line) = chart._lines(chart.series[0], 0, 1_999, 100)
    assert (noise, mean) == ("chart--noise", "chart--train")
    assert {(c.low, c.high) for c in points} == {(1.0, 2.0)} and all(1.4 < c.low < 1.6 for c in line)
    canvas = Canvas(50, 6)
    canvas.line(points, (0.9, 2.1), noise, dots=False)
    canvas.line(line, (0.9, 2.1), mean, dots=False)
    most = {name: max(b.bit_count() for b, o in zip(canvas.bits, canvas.owner) if o == name) for name in (noise, mean)}
    assert most == {noise: 8, mean: 2}


def test_steps_that_are_done_again_replace_what_was_there():
    series = Series("train", "chart--train")
    for step in (1, 2, 3, 4, 5):
        series.add(step, float(step))
    series.add(3, 30.0)  # resumed from the checkpoint of step 2
    assert (series.xs.tolist(), series.ys.tolist()) == ([1, 2, 3], [1.0, 2.0, 30.0])


# --- ticks -----------------------------------------------------------------------------------------------------------


@given(st.floats(-1e5, 1e5), st.floats(1e-3, 1e5), st.integers(2, 12))
def test_ticks_are_round_inside_and_at_least_two(low, span, wanted):
    ticks = nice_ticks(low, low + span, wanted)
    assert 2 <= len(ticks) <= 2.5 * wanted + 2
    margin = span * 1e-6
    assert all(low - margin <= t <= low + span + margin for t in ticks)


def test_log_ticks():
    assert log_ticks(0.01, 10, 3) == pytest.approx([0.01, 0.1, 1, 10])
    assert log_ticks(0.9, 6, 4) == pytest.approx([1, 2, 5])
    assert len(log_ticks(0.41, 0.46, 4)) >= 2


@pytest.mark.parametrize("value, text", [(0.5, "0.5"), (1234.0, "1234"), (2e-4, "2.0e-4"), (0.0, "0"), (3e6, "3.0e6")])
def test_tick_text(value, text):
    assert tick_text(value) == text


# --- drawing ---------------------------------------------------------------------------------------------------------


def drawn(canvas):
    """The canvas as text, a blank braille-free grid cell as a space."""
    return ["".join(s.text for s in row) for row in canvas.strips(lambda name: None, None)]


def test_a_flat_line_is_one_row_of_dots():
    canvas = Canvas(5, 3)
    columns = [Column(i, 0.5, 0.5, 0.5, 0.5, i > 0, 0.5, 1) for i in range(10)]
    canvas.line(columns, (0.0, 1.0), "chart--train", dots=False)
    rows = drawn(canvas)
    assert rows[0].strip() == "" and rows[2].strip() == ""
    assert len(set(rows[1])) == 1 and rows[1][0] in "⠉⠒⠤⣀"


def test_a_gap_stays_empty():
    canvas = Canvas(5, 3)
    left = Column(0, 0.5, 0.5, 0.5, 0.5, False, 0.5, 1)
    right = Column(9, 0.5, 0.5, 0.5, 0.5, False, 0.5, 1)
    canvas.line([left, right], (0.0, 1.0), "chart--train", dots=False)
    assert drawn(canvas)[1][1:4] == "   "
    right.joined = True
    canvas.line([left, right], (0.0, 1.0), "chart--train", dots=False)
    assert " " not in drawn(canvas)[1]


def test_the_view_follows_until_the_user_zooms():
    series = Series("train", "chart--train", xs=array("d", range(101)), ys=array("d", [1.0] * 101))
    chart = Chart([series])
    assert chart.window is None and chart.extent() == (0.0, 100.0)
    chart.zoom(0.5)
    assert chart.window == (50.0, 100.0)  # the newest half
    series.add(200, 1.0)
    assert chart.window == (50.0, 100.0)  # stays where it was put
    chart.pan(-10)
    assert chart.window == (0.0, 50.0)
    chart.zoom(10)
    assert chart.window is None


# --- bars ------------------------------------------------------------------------------------------------------------


def test_the_memory_bar_marks_budget_and_peak():
    text = memory_bar(40, [(10e9, "green")], 40e9, 28e9, peak=20e9).plain
    assert text.count("█") == 10 and len(text) == 40
    assert [i for i, c in enumerate(text) if c == "┃"] == [20, 28]
    assert "█" not in memory_bar(40, [(0.0, "green")], 40e9, 28e9).plain


def test_a_bar_never_leaves_its_width():
    for share in (-1, 0, 0.01, 0.5, 0.999, 1, 7):
        assert len(bar(17, share, "red").plain) == 17


def test_clip_and_sparkline():
    assert clip("a long name", 6) == "a lon…" and clip("/a/long/path", 6, keep_end=True) == "…/path"
    assert sparkline([0, 1, 2, 3], 8) == "▁▃▆█" and sparkline([], 8) == ""


# --- the run model ---------------------------------------------------------------------------------------------------


def test_rate_and_time_left_come_from_the_events():
    progress = Progress("merge")
    for i in range(5):
        progress.update({"t": 100.0 + i, "done": 10.0 * i, "total": 100.0, "unit": "bytes"})
    assert progress.rate == pytest.approx(10.0) and progress.left_s == pytest.approx(6.0)
    assert progress.fraction == pytest.approx(0.4)


def test_the_model_of_a_run(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 3.0)
    model = RunModel({"command": "train", "started": 0, "options": {"budget_gb": {"value": 28.5, "from": "default"}}})
    model.feed(
        [
            {"kind": "phase", "name": "train", "text": "10 steps"},
            {"kind": "metric", "t": 1.0, "step": 1, "total_steps": 10, "loss": 2.0, "learning_rate": 1e-4},
            {"kind": "metric", "t": 3.0, "step": 2, "total_steps": 10, "loss": None, "samples_per_s": 4.0},
            {"kind": "eval", "t": 3.0, "step": 2, "eval_loss": 1.5},
            {"kind": "oom", "t": 3.5, "step": 2, "phase": "backward"},
            {"kind": "preset", "t": 3.6, "name": "oom-6f-512px"},
            {"kind": "gpu", "t": 4.0, "device": 0, "backend": "cuda", "process_bytes": 9e9, "total_bytes": 40e9},
            {"kind": "gpu", "t": 5.0, "device": 0, "backend": "cuda", "process_bytes": 5e9, "total_bytes": 40e9},
            {"kind": "something-of-a-later-version", "t": 6.0, "x": [1]},
        ]
    )
    assert model.option("budget_gb") == 28.5
    assert model.train.ys[0] == 2.0 and math.isnan(model.train.ys[1])
    assert model.left_s == pytest.approx(16.0) and model.samples_per_s == 4.0
    assert model.best_eval() == (2, 1.5)
    assert model.marks == [Mark(2, "OOM", "chart--oom"), Mark(2, "oom-6f-512px")]
    assert model.preset == "oom-6f-512px"
    device = model.devices["0"]
    assert isinstance(device, Device) and device.used_bytes == 5e9 and device.peak_bytes == 9e9 and not device.is_host


# --- the run list ------------------------------------------------------------------------------------------------


def test_ended_runs_are_read_once_and_again_when_their_files_change(tmp_path, monkeypatch):
    target = LocalTarget(Workspace(tmp_path, {}, {}))
    with folder.Run.create(tmp_path / "runs", "train", run_id="a"):
        pass
    live = folder.Run.create(tmp_path / "runs", "train", run_id="b")
    assert {r.id: r.state for r in target.runs()} == {"a": "finished", "b": "running"}
    read = []
    summary = history.summary
    monkeypatch.setattr(history, "summary", lambda folder: read.append(folder.name) or summary(folder))
    assert {r.id: r.state for r in target.runs()} == {"a": "finished", "b": "running"} and read == ["b"]
    live.emit("finished", state="stopped", exit_code=0, result={})
    assert {r.id: r.state for r in target.runs()} == {"a": "finished", "b": "stopped"}
    read.clear()
    target.runs()
    assert read == []


async def test_paths_are_completed_as_they_are_typed(tmp_path):
    (tmp_path / "checkpoints" / "stage1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes.txt").touch()
    suggester = PathSuggester(tmp_path)
    assert await suggester.get_suggestion("che") == "checkpoints/"
    assert await suggester.get_suggestion("checkpoints/s") == "checkpoints/stage1/"
    assert await suggester.get_suggestion(f"{tmp_path}/checkpoints/n") == f"{tmp_path}/checkpoints/notes.txt"
    assert await suggester.get_suggestion("nowhere/x") is None
