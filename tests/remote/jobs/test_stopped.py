"""Setup and upload that are stopped (SIGTERM, as the panel does): they say so, leave nothing running, go on later."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sshd import Relay, laptop, processes_naming  # noqa: F401
from waiting import until

from surgvqa.runs.state import state_of

pytestmark = pytest.mark.slow

MB = 1_000_000


def begun(laptop, *words: str) -> tuple[subprocess.Popen[str], Path]:  # noqa: F811
    """`surgvqa-remote WORDS` at work, and its run folder."""
    argv = [sys.executable, "-m", "remote", *words]
    process = subprocess.Popen(argv, cwd=laptop.workspace, stderr=subprocess.PIPE, text=True)
    found = until(lambda: list((laptop.workspace / "runs").glob(f"*-{words[0]}-*/events.jsonl")))
    return process, found[-1].parent


def ended(process: subprocess.Popen[str], folder: Path, *signals: int) -> str:
    """Sends the signals; the last line that it says. It ends as stopped."""
    for number in signals:
        process.send_signal(number)
    said = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 1 and state_of(folder) == "stopped"
    return said


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM, signal.SIGTERM)])
def test_a_stopped_upload_keeps_what_arrived_and_leaves_no_ssh(laptop, signals):  # noqa: F811
    size = 40 * MB
    (laptop.workspace / "merged").mkdir()
    content = random.Random(0).randbytes(size)
    (laptop.workspace / "merged" / "model.safetensors").write_bytes(content)
    relay = Relay(laptop.server.port, bytes_per_s=20 * MB)
    laptop.server.write_config(port=relay.port)
    words = ("upload", "gpuhost", "--model_name_or_path", "merged", "--streams", "2")
    process, folder = begun(laptop, *words)
    until(lambda: relay.passed > size * 0.6)
    assert "run it again to go on" in ended(process, folder, *signals)
    until(lambda: not processes_naming(laptop.server.config))  # the ssh processes of its streams
    assert not (laptop.there / "merged").exists()
    relay.bytes_per_s = None
    sent = laptop.json(*words)["sent_bytes"]
    assert 0 < sent < size * 0.8
    assert (laptop.there / "merged" / "model.safetensors").read_bytes() == content
    relay.close()


def test_a_stopped_setup_ends_what_it_started_there(laptop):  # noqa: F811
    laptop.host(python=sys.executable)
    process, folder = begun(laptop, "setup", "gpuhost", "--extra", "")
    venv = laptop.there / "venv"
    until(lambda: processes_naming(venv))  # it is being made
    ended(process, folder, signal.SIGTERM)
    until(lambda: not processes_naming(venv), 15)  # the agent notices at its next beat
    assert not (laptop.there / ".surgvqa" / "installed.json").exists()


def test_a_program_on_the_host_ends_with_the_connection(laptop):  # noqa: F811
    """As pip does: it prints nothing for long, and has children."""
    mark = laptop.root / "mark"
    wait = f"import time; time.sleep(99) # {mark}"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {wait!r}]); print(1, flush=True); {wait}"
    with laptop.connect() as remote:
        said = remote.stream("execute", argv=[sys.executable, "-c", code])
        assert next(said)["line"] == "1"
        until(lambda: len(processes_naming(mark)) == 2)  # a program that is just being started has no name
        said.close()
        until(lambda: not processes_naming(mark), 15)
