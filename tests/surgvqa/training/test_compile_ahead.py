"""A layer compiled in a child process is the one that training needs; whatever the child does, training goes on."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
from places import ROOT

from surgvqa.model import compile_ahead
from surgvqa.model.compile_ahead import CompileAhead, LayerJob

KITS = ROOT / "tests" / "kits"
JOB = LayerJob("", {}, "sdpa", "all", (False,), (True,), 1, 64, "bfloat16", True, "cuda:0")


def child(monkeypatch, body: str) -> None:
    monkeypatch.setattr(compile_ahead, "CHILD", (sys.executable, "-c", textwrap.dedent(body)))


def said(ahead: CompileAhead, word: str) -> None:
    """Waits until the child has said it."""
    deadline = time.monotonic() + 20
    while word not in ahead._said and time.monotonic() < deadline:
        time.sleep(0.01)
    assert word in ahead._said


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    "body, word, told",
    [
        ('print(\'{"begun": 1}\\n{"done": 2.5}\')', "done", "a layer was compiled ahead in 2.5 s"),
        ("print('{\"begun\": 1}', flush=True); import time; time.sleep(60)", "begun", "(it took too long)"),
        ("import time; time.sleep(60)", "", "(the model was loaded before it began)"),
        ("print('no json')", "failed", "(the process ended)"),
        ('print(\'{"failed": "ValueError: x"}\')', "failed", "(ValueError: x)"),
    ],
)
def test_whatever_the_child_does_is_told_and_it_is_ended(monkeypatch, tmp_path, body, word, told):
    child(monkeypatch, body)
    monkeypatch.setattr(compile_ahead, "LONGEST_S", 0.2)
    with CompileAhead() as ahead:
        ahead.begin(JOB, tmp_path / "mark")
        process = ahead._child
        if word:
            said(ahead, word)
        assert told in ahead.finish()
        assert process.returncode is not None


def test_a_child_that_is_compiling_is_waited_for(monkeypatch, tmp_path):
    body = "import time; print('{\"begun\": 1}', flush=True); time.sleep(0.5); print('{\"done\": 0.5}', flush=True)"
    child(monkeypatch, body)
    with CompileAhead() as ahead:
        ahead.begin(JOB, tmp_path / "mark")
        said(ahead, "begun")
        assert "a layer was compiled ahead" in ahead.finish()


def test_an_error_of_the_run_ends_the_child(monkeypatch, tmp_path):
    child(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(RuntimeError), CompileAhead() as ahead:
        ahead.begin(JOB, tmp_path / "mark")
        process = ahead._child
        raise RuntimeError
    assert process.returncode == -9


def test_a_program_that_cannot_be_started_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(compile_ahead, "CHILD", (str(tmp_path / "none"),))
    with CompileAhead() as ahead:
        ahead.begin(JOB, tmp_path / "mark")
        assert "no layer was compiled ahead (No such file" in ahead.finish()


def test_no_child_is_started_for_a_layer_that_is_in_the_cache(monkeypatch, tmp_path):
    child(monkeypatch, "raise SystemExit")
    (tmp_path / "mark").touch()
    with CompileAhead() as ahead:
        ahead.begin(JOB, tmp_path / "mark")
        assert ahead._child is None and "earlier run" in ahead.finish()
    assert CompileAhead().finish() == "", "nothing is told where nothing was to be compiled"


def test_the_child_and_its_compiler_end_when_the_run_is_killed(tmp_path):
    body = """
        import subprocess, sys, threading
        from surgvqa.model.compile_ahead import end_with_parent
        worker = subprocess.Popen(["sleep", "60"])
        print('{"begun": "%d %d"}' % (__import__("os").getpid(), worker.pid), flush=True)
        sys.stdin.readline()
        end_with_parent()
    """
    run = f"""
        import sys, time
        from pathlib import Path
        from surgvqa.model import compile_ahead
        compile_ahead.CHILD = (sys.executable, "-c", {textwrap.dedent(body)!r})
        ahead = compile_ahead.CompileAhead()
        ahead.begin(compile_ahead.LayerJob("", {{}}, "", "", (), (), 1, 1, "", True, ""), Path("none"))
        while "begun" not in ahead._said:
            time.sleep(0.01)
        print(ahead._said["begun"], flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(run)], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_a_mark_is_for_one_job_on_one_device(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    job = replace(JOB, checkpoint=str(tmp_path))
    mark = job.mark(tmp_path, "H100")
    assert mark == job.mark(tmp_path, "H100") and mark.parent == tmp_path
    others = [replace(job, tokens=72), replace(job, keep="products"), replace(job, lora={"lora_r": 8})]
    assert len({mark, job.mark(tmp_path, "A100"), *(other.mark(tmp_path, "H100") for other in others)}) == 5
    (tmp_path / "config.json").write_text("{ }")
    assert job.mark(tmp_path, "H100") != mark


TRAINING = """
    import json, pickle, sys
    from pathlib import Path

    import torch._dynamo.utils
    from surgvqa.model.compile_ahead import CompileAhead
    from surgvqa.training import layer_job
    from watched import Watched

    begin = CompileAhead.begin

    def begin_and_wait(ahead, job, mark):
        begin(ahead, job, mark)
        ahead._heard.wait(300)

    layer_job.DEVICES = ("cpu",)
    CompileAhead.begin = begin_and_wait
    run = Watched(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
    told = [event["text"] for event in run.of("phase") if event["name"] == "compile"]
    counters = torch._dynamo.utils.counters
    found = {"autograd": counters["aot_autograd"], "fx": counters["inductor"]}
    print(json.dumps(found | {"told": told, "last": run.of("metric")[-1]}))
"""


@pytest.mark.model
@pytest.mark.slow
def test_training_compiles_nothing_that_the_child_has_compiled(world, tmp_path):
    """In a process of its own, as a training is: what else a process has compiled is part of the keys."""
    pattern = r"model\.layers\.\d+\.self_attn\.q_proj"
    options = world.train_options(compile="on", max_steps=2, lora_target_modules=pattern)
    (tmp_path / "options").write_bytes(pickle.dumps(options))
    environment = {**os.environ, "PYTHONPATH": f"{KITS}:{ROOT}", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    program = [sys.executable, "-c", textwrap.dedent(TRAINING), str(tmp_path / "options"), str(tmp_path / "runs")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["told"]) == 1 and found["told"][0].startswith("a layer was compiled ahead"), found["told"]
    last = found["last"]
    assert last["graphs"] == last["cached_graphs"] == 1 and last["compile_failures"] == 0
    assert not found["autograd"].get("autograd_cache_miss") and not found["autograd"].get("autograd_cache_bypass")
    assert not found["fx"].get("fxgraph_cache_miss") and found["fx"]["fxgraph_cache_hit"]
    assert len(list((tmp_path / "compiled").glob(f"{compile_ahead.MARK}*"))) == 1
