"""The panel on a GPU host: over a real sshd; and its link over connections that break."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from sshd import TRAIN, Relay, laptop, stub_train  # noqa: F401
from test_tui import panel, settle, text
from textual.widgets import Log, OptionList

from remote.connection import Unreachable
from surgvqa import config, runs
from surgvqa.errors import SurgvqaError
from tui.chart import Chart
from tui.host import HostTarget
from tui.link import Detached, Link
from tui.monitor import MonitorScreen
from tui.picker import HostKey, HostPicker

pytestmark = pytest.mark.slow


def wait_for(condition, seconds: float = 30.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


@pytest.fixture
def link(laptop):  # noqa: F811
    one = Link("gpuhost", laptop.workspace)
    yield one
    one.end()


# --- the link --------------------------------------------------------------------------------------------------------


def test_many_threads_ask_over_one_connection(laptop, link):  # noqa: F811
    from concurrent.futures import ThreadPoolExecutor

    wait_for(lambda: link.light.kind == "connected")
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: link.call("probe", venv="venv")["workspace"], range(24)))
    assert set(answers) == {str(laptop.there)}
    assert len(laptop.server.sessions()) <= 3  # listener's child, its session: one connection
    with pytest.raises(SurgvqaError, match="no such run|no runs"):
        link.call("runs", run="none")
    assert link.light.kind == "connected"


def test_a_lost_connection_is_unreachable_since_and_comes_back(laptop, link):  # noqa: F811
    wait_for(lambda: link.light.kind == "connected")
    laptop.server.stop()
    wait_for(lambda: link.light.kind == "unreachable")
    since = link.light.since
    with pytest.raises(Unreachable):
        link.call("runs")
    time.sleep(1.5)
    assert link.light.since == since
    laptop.server.start()
    wait_for(lambda: link.light.kind == "connected")
    assert link.call("runs")["runs"] == []
