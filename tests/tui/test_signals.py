"""A signal or a crash leaves the terminal as it was, and a crash names its report."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

RESTORED = (b"\x1b[?1049l", b"\x1b[?25h", b"\x1b[?1000l")
"""Main screen, cursor shown, mouse off."""


def started(root, tmp_path, code: str) -> tuple[subprocess.Popen, int]:
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "XDG_STATE_HOME": str(tmp_path / "state"),
                   "XDG_CONFIG_HOME": str(tmp_path / "config")}  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--workspace", str(root)],
        stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(side)
    return process, main


def read_until(main: int, wanted: bytes, seconds: float = 60) -> bytes:
    """What the terminal was sent, until `wanted` is in it or nothing more comes."""
    read, end = b"", time.monotonic() + seconds
    while wanted not in read and time.monotonic() < end:
        if select.select([main], [], [], 0.2)[0]:
            try:
                read += os.read(main, 1 << 16)
            except OSError:
                break
    return read


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_the_terminal_as_it_was(root, tmp_path, number):
    process, main = started(root, tmp_path, "import sys; from tui.main import main; sys.exit(main())")
    try:
        assert b"Merge" in read_until(main, b"quit")
        process.send_signal(number)
        left = read_until(main, b"no such text", 20)
        assert process.wait(20) == 128 + number
        assert all(sequence in left for sequence in RESTORED)
    finally:
        process.kill()
        os.close(main)


def test_a_crash_leaves_the_terminal_as_it_was_and_names_its_report(root, tmp_path):
    code = (
        "import sys; from tui.main import main; from tui.app import Panel\n"
        "def action_help(self): raise RuntimeError('as if by accident')\n"
        "Panel.action_help = action_help; sys.exit(main())"
    )
    process, main = started(root, tmp_path, code)
    try:
        assert b"Merge" in read_until(main, b"quit")
        os.write(main, b"?")
        left = read_until(main, b"no such text", 20)
        assert process.wait(20) == 1
        assert all(sequence in left for sequence in RESTORED) and b"panel.log" in left
        assert "as if by accident" in (tmp_path / "state/surgvqa/panel.log").read_text()
    finally:
        process.kill()
        os.close(main)


def test_a_terminal_that_is_gone_without_a_signal_ends_the_panel(root, tmp_path):
    """As with nohup, or in a session that has no controlling terminal: it must not turn in circles for ever."""
    process, main = started(root, tmp_path, "import sys; from tui.main import main; sys.exit(main())")
    try:
        assert b"Merge" in read_until(main, b"quit")
    finally:
        os.close(main)
    try:
        assert process.wait(20) != 0
    finally:
        process.kill()
