"""The Upload and Merge screens, and a job that outlives the panel."""

import json
import os
import pty
import signal
import sys
from pathlib import Path

import pytest
from panels import go, panel, settle, text
from waiting import until

from surgvqa.runs.state import read_run_json, state_of


async def test_the_upload_plan_counts_only_what_the_samples_name(root):
    (root / "frames" / "v1").mkdir(parents=True)
    (root / "audio").mkdir()
    for number in range(10):
        (root / "frames" / "v1" / f"v1_{number}.jpg").write_bytes(b"x" * 100)
    (root / "audio" / "q1.wav").write_bytes(b"y" * 50)
    line = {
        "id": "q1", "video_id": "v1", "frames": [f"v1_{i}" for i in range(8)], "question": "Is a tool there?",
        "question_type": "tool", "answer": "yes, a snare", "short_answer": "yes",
    }  # fmt: skip
    (root / "train.jsonl").write_text(json.dumps(line) + "\n")
    app = panel(root, host="lambda")
    async with app.run_test(size=(120, 36)) as pilot:
        await pilot.press("2")
        await settle(pilot, lambda: "training frames" in text(app, "#plan-text"))
        rows = {row[:20].strip(): row.split() for row in text(app, "#plan-text").splitlines()}
        assert rows["training frames"][3] == "8" and rows["training frames"][4] == "800"
        assert rows["training audio"][3] == "1"
        assert "merge first" in text(app, "#plan-text")
        assert "lambda" in text(app, "#host-text")


async def test_a_dry_run_that_is_refused_says_so(root):
    (root / "surgvqa.toml").write_text('[merge]\nstage1_model_path = "none"\nstage2_adapter_path = "none2"\n')
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: "no such folder" in text(app, "#merge-text"), 60)


async def test_what_a_field_of_the_merge_is_for_stands_below(root):
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "merge")
        form = app.screen.query_one("#merge-form")
        await settle(pilot, lambda: "Stage-1 checkpoint folder" in str(form.border_subtitle))
        await pilot.press("down", "down", "down")
        await settle(pilot, lambda: "audio_projector.pt" in str(form.border_subtitle))
        assert not app.screen.check_action("revert", ())


async def test_what_a_setting_of_the_training_is_for_stands_below_where_there_is_no_room_beside(root):
    app = panel(root)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("3")
        form = app.screen.query_one("#train-form")
        await settle(pilot, lambda: "name of the run" in str(form.border_subtitle))
        await pilot.resize_terminal(120, 36)
        await settle(pilot, lambda: not form.border_subtitle and "name of the run" in text(app, "#about"))


async def test_what_was_wrong_is_said_no_longer_when_it_is_mended(root):
    (root / "stage1").mkdir()
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await pilot.press("1")
        await settle(pilot, lambda: "Choose the" in text(app, "#merge-text"))
        await pilot.press("m")
        await settle(pilot, lambda: "--stage1_model_path" in text(app, "#notice"), 60)
        await pilot.press("enter", *"stage1", "enter")
        await settle(pilot, lambda: app.screen.settings.edited)
        await settle(pilot, lambda: text(app, "#notice") == "")


@pytest.mark.model
async def test_merge_from_the_panel(root, oracle):
    """Plan, start, progress, report: with the real command on the oracle's folders."""
    merge_settings(root, oracle)
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: "21 modules merged" in text(app, "#merge-text"), 90)
        assert not (root / "runs").exists()  # a plan leaves nothing behind
        await pilot.press("m")
        await settle(pilot, lambda: "✓ merged" in text(app, "#merge-text"), 120)
        assert "how far each layer moved" in text(app, "#merge-text")
        await pilot.press("a")
        await settle(pilot, lambda: "93 " in text(app, "#merge-text") and "BF16" in text(app, "#merge-text"), 60)


@pytest.mark.model
def test_a_job_outlives_the_panel_that_started_it(root, oracle):
    """In a real terminal: the panel is killed with its whole session as soon as the job is there."""
    merge_settings(root, oracle)
    process, terminal = in_a_terminal([sys.executable, "-m", "tui.main", "--workspace", str(root)])
    try:
        until(lambda: b"modules merged" in terminal())
        os.write(process.terminal, b"m")
        folder = until(lambda: next((p.parent for p in (root / "runs").glob("*/run.json")), None))
        until(lambda: read_run_json(folder).get("pid"))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        os.waitpid(process.pid, 0)
        os.close(process.terminal)  # the terminal hangs up
    until(lambda: state_of(folder) not in ("starting", "running"))
    assert state_of(folder) == "finished"
    assert (root / "merged" / "merge_report.json").is_file()


def merge_settings(root: Path, oracle: Path) -> None:
    (root / "surgvqa.toml").write_text(
        f'[merge]\nstage1_model_path = "{oracle}/stage1"\nstage2_adapter_path = "{oracle}/stage2_adapter"\n'
        'output_path = "merged"\nmax_shard_size = "10MB"\n'
    )


class Terminal:
    """A process that leads a session of its own on a pseudo-terminal."""

    def __init__(self, pid: int, terminal: int):
        self.pid, self.terminal = pid, terminal


def in_a_terminal(argv):
    """Starts `argv` on a new terminal; the second value reads what it has drawn so far."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="120", LINES="36")
        os.execv(argv[0], argv)
    os.set_blocking(terminal, False)
    seen = bytearray()

    def read() -> bytes:
        try:
            while True:
                seen.extend(os.read(terminal, 65536))
        except OSError:
            return bytes(seen)

    return Terminal(pid, terminal), read
