"""What a Mac runs: the light commands without /proc and without what only Linux has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_kit import SHARDS, write_folder

LIKE_A_MAC = r'''
import os, signal, sys, json, platform
import psutil, selectors, asyncio, subprocess, multiprocessing, ctypes, shutil, tempfile  # chosen by the real platform

for name in sys.argv[2:]:
    __import__(name)

def no_proc(event, arguments):
    """/proc is not there, but for psutil, which on a Mac needs none."""
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith("/proc"):
        frame = sys._getframe(1)
        while frame:
            if "psutil" in frame.f_code.co_filename:
                return
            frame = frame.f_back
        tried.append(arguments[0])
        raise FileNotFoundError(2, "No such file or directory", arguments[0])

tried = []
sys.addaudithook(no_proc)
sys.platform = "darwin"
platform.system = lambda: "Darwin"
for name in ("sched_getaffinity", "posix_fadvise", "posix_fallocate", "O_DIRECT", "pidfd_open", "copy_file_range",
             "splice", "eventfd", "memfd_create"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("sigtimedwait", "pidfd_send_signal", "sigwaitinfo"):
    if hasattr(signal, name):
        delattr(signal, name)
import presets, surgvqa.files, surgvqa.runs.launch, surgvqa.runs.commands, remote.cli.main, remote.jobs, tui.main
from surgvqa.cli.main import main
codes = [main(words) for words in json.loads(sys.argv[1])]
print(json.dumps({"codes": codes, "tried": tried}))
'''


def like_a_mac(*commands: list, first: tuple[str, ...] = ()) -> list[int]:
    """The exit codes of `surgvqa` commands in a process without /proc; `first`: built for the real platform."""
    words = [[str(word) for word in command] for command in commands]
    done = subprocess.run([sys.executable, "-c", LIKE_A_MAC, json.dumps(words), *first], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["codes"]


def test_the_light_commands_run_without_proc(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", SHARDS)
    (tmp_path / "p.jsonl").write_text(
        '{"id": "a", "question_type": "t", "predicted_answer": "Yes.", "short_answer": "yes", "ground_truth": "Yes."}\n'
    )
    workspace = ["--workspace", tmp_path]
    codes = like_a_mac(
        ["audit", tmp_path / "c", *workspace, "--json"],  # not BF16 alone: 0 or 1, no traceback
        ["runs", *workspace],
        ["gpus", *workspace],
        ["presets", *workspace],
        ["budget", *workspace],
        ["evaluate", "--predictions", tmp_path / "p.jsonl", *workspace],
    )
    assert codes == [0] * 6


@pytest.mark.model
def test_a_merge_runs_without_proc(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from merge_kit import LORA, trained

    base, adapter, _ = trained(tmp_path, LORA)
    words = ["merge", "--stage1_model_path", base, "--stage2_adapter_path", adapter, "--output_path", tmp_path / "out"]
    assert like_a_mac([*words, "--workspace", tmp_path], first=("torch",)) == [0]
