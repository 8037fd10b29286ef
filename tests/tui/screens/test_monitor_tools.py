"""Monitor's tools: marks and comparing, the list's filter and order, the timeline's entries."""

from panels import options, panel, settle, text, timeline, training
from textual.widgets import OptionList

from surgvqa.runs.folder import Run
from tui.dialogs.entry import EntryDialog
from tui.screens.compare import CompareScreen
from tui.screens.monitor import MonitorScreen
from tui.widgets.chart import Chart
from tui.widgets.timeline_view import TimelineView


async def test_marked_runs_are_compared(root):
    with training(root, name="slow", steps=70):
        pass
    with Run.create(root / "runs", "evaluate", options=options(checkpoint=str(next((root / "runs").iterdir())))) as run:
        run.result.update(keyword_accuracy=0.77, keyword_interval=[0.7, 0.83], by_type={"phase": {"n": 3}})
    training(root, name="fast [lr=2e-4]", steps=80).emit("checkpoint", step=80, path="c/checkpoint-80")
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        runs = app.screen.query_one("#runs", OptionList)
        await settle(pilot, lambda: runs.option_count == 3 and runs.has_focus)
        assert not app.screen.check_action("compare", ())
        await pilot.press("slash", *"train", "enter", "space", "down", "space")
        assert runs.option_count == 2 and len(runs.marked) == 2
        await pilot.press("d")
        await settle(pilot, lambda: isinstance(app.screen, CompareScreen) and "slow" in text(app, "#compare-text"))
        await settle(pilot, lambda: [len(s.xs) for s in app.screen.query_one(Chart).series] == [80, 1, 70, 1])
        table = text(app, "#compare-text")
        assert "fast [lr=2e-4]" in table and "77.0 % (70.0 to 83.0)" in table and "none: they were started" in table
        await pilot.press("m", "a")
        await settle(pilot, lambda: "budget_gb" in text(app, "#compare-text"))
        await pilot.press("escape")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen))
        await pilot.press("slash", "backspace", "enter", "z", "z")  # by name, by state
        assert [str(o.id).split("-")[2] for o in runs.options] == ["evaluate", "train", "train"]


async def test_an_entry_moves_the_charts_cursor_and_an_error_opens_its_place(root):
    run = training(root)
    (run.folder / "log.txt").write_text("loading\nTraceback (most recent call last)\nValueError: no frame 17 there\n")
    run.emit("oom", step=12, text="lack")
    run.emit("error", text="ValueError: no frame 17 there")
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and len(timeline(app)) > 5)
        view = app.screen.query_one(TimelineView)
        await pilot.press("i", "l", "l")
        assert [entry.level for entry in view.visible_entries] == ["error", "error"]
        await pilot.press("home", "enter")
        await settle(pilot, lambda: isinstance(app.screen, EntryDialog))
        assert app.screen_stack[0].query_one(Chart).cursor == 12
        await pilot.press("escape", "down", "enter")
        await settle(pilot, lambda: isinstance(app.screen, EntryDialog) and "frame 17" in app.screen.text)
        assert "Traceback" in app.screen.parts[0][1]
        await pilot.press("escape", "y")
        await settle(pilot, lambda: app.clipboard == "ValueError: no frame 17 there")
        assert view.level == 0 and view.entry.level == "output"  # its own line, which the filter had hidden
        await pilot.press("w")
        assert not view.wrapped


async def test_a_change_of_size_leaves_the_timeline_at_its_end(root):
    """Fewer rows, or more room for them, move it up as the mouse wheel does: it is not to stop following for that."""
    run = training(root)
    for number in range(40):
        run.warning(f"a warning that takes two rows where there is little room, and one row where there is: {number}")
    app = panel(root)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and len(timeline(app)) > 40)
        view = app.screen.query_one(TimelineView)
        for size in ((200, 60), (80, 24), (120, 50), (100, 30)):
            await pilot.resize_terminal(*size)
            await settle(pilot, lambda size=size: app.size == size and view.scroll_y == view.max_scroll_y)
            assert view.following and view.vertical_scrollbar.position == view.scroll_y
        view.scroll_up(animate=False)
        await settle(pilot, lambda: not view.following)
