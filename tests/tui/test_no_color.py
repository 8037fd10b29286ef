"""NO_COLOR: no colour at all, and what colours tell is told otherwise."""

import os
import subprocess
import sys

from panels import go, panel, settle, text, training

from tui.content import memory


async def test_no_colour_reaches_the_terminal(root, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    training(root)
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "monitor")
        await settle(pilot, lambda: "host memory" in text(app, "#gauge"), 40)
        drawn = [segment for strip in app.screen._compositor.render_strips() for segment in strip]
        styles = [segment.style for segment in drawn if segment.style]
        assert not [style for style in styles if style.color or style.bgcolor]
        assert any(style.bold for style in styles)


def test_the_memory_legend_needs_no_colour():
    code = (
        "from tui.content.memory import *; parts = [Part(n, b) for n, b in (('a', 3e9), ('b', 2e9), ('c', 1e9))];"
        "print(predicted_bar(40, parts, 6e9, 8e9).plain); print(predicted_legend(parts, 40).plain)"
    )
    drawn = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    marks = [row[0] for row in drawn[1:]]
    assert len(set(marks)) == 3 and all(mark in drawn[0] for mark in marks)
    assert len(set(memory.FILLS)) == 1 or "NO_COLOR" in os.environ
