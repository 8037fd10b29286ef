"""The run folder: what a job writes, what a watcher can trust."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from waiting import until

from surgvqa import files
from surgvqa.cli import main
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs import events, history, launch, process
from surgvqa.runs.events import EventTail, finished_event
from surgvqa.runs.folder import Run
from surgvqa.runs.state import FIELDS as RUN_FIELDS
from surgvqa.runs.state import read_run_json, state_of
from surgvqa.terminal.job_view import DRAWN
from surgvqa.untrusted import parse_json


def test_a_run_writes_what_a_reader_reads(tmp_path):
    with Run.create(tmp_path, "merge", options={"seed": {"value": 1, "from": "default"}}) as run:
        run.phase("merge")
        run.progress("merge", 5, 10, "shards")
        run.emit("metric", step=3, loss=float("nan"))
        run.result = {"modules_merged": 21}
        assert state_of(run.folder) == "running"
    events = EventTail(run.folder / "events.jsonl").read()
    assert [e["kind"] for e in events] == ["phase", "progress", "metric", "finished"]
    assert events[2]["loss"] is None, "JSON has no NaN"
    assert all(e["v"] == 1 and abs(e["t"] - time.time()) < 60 for e in events)
    assert events[-1]["result"] == {"modules_merged": 21}
    (summary,) = history.list_runs(tmp_path)
    assert (summary.state, summary.command, summary.steps) == ("finished", "merge", 3)


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (SurgvqaError("no"), "failed", 1),
        (UsageError("no"), "failed", 2),
        (KeyboardInterrupt(), "stopped", 1),
        (ValueError("no"), "failed", 1),
    ],
)
def test_how_a_run_ended_is_told(tmp_path, error, state, code):
    run = Run.create(tmp_path, "train")
    with pytest.raises(type(error)), run:
        raise error
    finished = finished_event(run.folder)
    assert (finished["state"], finished["exit_code"]) == (state, code)
    assert state_of(run.folder) == state


def test_a_half_written_line_is_not_yet(tmp_path):
    file = tmp_path / "events.jsonl"
    tail = EventTail(file)
    assert tail.read() == []
    file.write_bytes(b'{"kind":"phase","name":"m')
    assert tail.read() == []
    with open(file, "ab") as handle:
        handle.write(b'erge"}\n{"kind":')
    assert [e["name"] for e in tail.read()] == ["merge"]
    assert tail.damaged == 0


def test_a_damaged_line_is_counted_and_passed_over(tmp_path):
    file = tmp_path / "events.jsonl"
    file.write_bytes(b'\xff\xfe{"kind"\n[1]\n{"no":"kind"}\n\n{"kind":"later-version"}\n')
    tail = EventTail(file)
    assert [e["kind"] for e in tail.read()] == ["later-version"]
    assert tail.damaged == 3


def test_a_file_that_shrank_is_read_from_its_start(tmp_path):
    file = tmp_path / "events.jsonl"
    file.write_text('{"kind":"a"}\n{"kind":"b"}\n')
    tail = EventTail(file)
    tail.read()
    file.write_text('{"kind":"c"}\n')
    assert [e["kind"] for e in tail.read()] == ["c"]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.none(), max_size=3), max_size=8),
    st.lists(st.integers(1, 40), max_size=30),
)
def test_events_arrive_once_and_in_order_however_the_file_grows(tmp_path_factory, payloads, cuts):
    file = tmp_path_factory.mktemp("tail") / "events.jsonl"
    data = b"".join(json.dumps({"kind": "x", "payload": p}).encode() + b"\n" for p in payloads)
    tail, seen, written = EventTail(file), [], 0
    for cut in [*cuts, len(data)]:
        with open(file, "ab") as handle:
            handle.write(data[written : written + cut])
        written += cut
        seen += tail.read()
    assert [e["payload"] for e in seen] == [parse_json(json.dumps(p)) for p in payloads]


def test_a_killed_job_died_and_a_reused_pid_is_not_it(tmp_path):
    run = Run.create(tmp_path, "train")
    job = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    info = read_run_json(run.folder) | {
        "pid": job.pid,
        "identity": process.process_identity(job.pid),
    }
    files.write_json_atomic(run.folder / "run.json", info)
    assert state_of(run.folder) == "running"
    job.kill()
    until(lambda: state_of(run.folder) == "died")  # a zombie until somebody waits: dead all the same
    job.wait()
    info |= {"pid": os.getpid(), "identity": "another boot:1"}
    files.write_json_atomic(run.folder / "run.json", info)
    assert state_of(run.folder) == "died"


def test_stop_asks_first_then_insists_and_takes_the_children_along(tmp_path):
    deaf = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    child = f"{deaf}; print('up', flush=True); time.sleep(60)"
    parent = f"{deaf}; subprocess.run([sys.executable, '-c', {child!r}])"
    run = Run.create(tmp_path, "train")
    job = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert job.stdout.readline() == b"up\n"
    (grandchild,) = psutil.Process(job.pid).children()
    info = read_run_json(run.folder) | {
        "pid": job.pid,
        "identity": process.process_identity(job.pid),
    }
    files.write_json_atomic(run.folder / "run.json", info)
    assert launch.stop(run.folder, grace_s=0.3) == "died"
    assert job.wait(5) == -signal.SIGKILL
    until(lambda: not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE)


def test_stops_that_come_late_do_not_kill_what_has_ended_as_stopped(tmp_path):
    """Python puts back the default of every handler before it exits: a late SIGTERM killed, exit code -15."""
    program = (
        "import sys, time; from pathlib import Path\n"
        "from surgvqa.cli.jobs import run_job; from surgvqa.runs.folder import Run\n"
        "try: run_job(Run.create(Path(sys.argv[1]), 'merge'), lambda run: print('up', flush=True) or time.sleep(60))\n"
        "except KeyboardInterrupt: sys.exit(1)"
    )
    argv, detached = [sys.executable, "-c", program, str(tmp_path)], os.environ | {"SURGVQA_DETACHED": "1"}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=detached) as job:
        assert job.stdout.readline() == b"up\n"
        while job.poll() is None:
            job.terminate()
            time.sleep(0.0005)
    assert job.returncode == 1


def test_stop_never_touches_a_process_that_is_not_the_run(tmp_path):
    run = Run.create(tmp_path, "train")
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        info = read_run_json(run.folder) | {"pid": bystander.pid, "identity": "someone else"}
        files.write_json_atomic(run.folder / "run.json", info)
        assert launch.stop(run.folder) == "died"
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_launched_job_has_its_own_session_and_leaves_its_words(tmp_path):
    folder = launch.launch("merge", ["--stage1_model_path", "nowhere", "--stage2_adapter_path", "nowhere"], tmp_path)
    until(lambda: state_of(folder) == "failed", 30)
    assert "nowhere" in (folder / "log.txt").read_text() and "Traceback" not in (folder / "log.txt").read_text()
    (error,) = [e for e in EventTail(folder / "events.jsonl").read() if e["kind"] == "error"]
    assert "nowhere" in error["text"]


def test_a_run_is_found_by_id_prefix_name_and_last(tmp_path):
    ids = ["20260101-000000-train-aaa", "20260101-000001-train-bbb"]
    for number, run_id in enumerate(ids):
        with Run.create(tmp_path, "train", run_id=run_id, options={"run_name": {"value": f"name{number}"}}):
            pass
        info = read_run_json(tmp_path / run_id) | {"started": float(number)}
        files.write_json_atomic(tmp_path / run_id / "run.json", info)
    assert history.find_run(ids[0], [tmp_path]).name == ids[0]
    assert history.find_run("20260101-000001", [tmp_path]).name == ids[1]
    assert history.find_run("name0", [tmp_path]).name == ids[0]
    assert history.find_run("last", [tmp_path]).name == ids[1]
    with Run.create(tmp_path, "evaluate") as evaluation:
        pass
    assert history.find_run("last", [tmp_path]).name == evaluation.id
    assert history.find_run("last", [tmp_path], "train").name == ids[1]
    assert history.find_run("last", [tmp_path], "merge").name == evaluation.id  # which says that it is no merge
    with pytest.raises(UsageError, match="matches 3 runs"):
        history.find_run("2026", [tmp_path])
    with pytest.raises(UsageError, match=r"matches 2 runs \(20260101-00000\d-train-..., 20260101-00000\d-train-...\);"):
        history.find_run("20260101", [tmp_path])
    with pytest.raises(UsageError, match="no such run"):
        history.find_run("x", [tmp_path])


def test_a_folder_of_another_host_is_unknown_not_dead(tmp_path):
    run = Run.create(tmp_path, "train")
    elsewhere = {"host": "elsewhere", "machine": "another", "pid": 1}
    files.write_json_atomic(run.folder / "run.json", read_run_json(run.folder) | elsewhere)
    assert state_of(run.folder) == "unknown"
    assert state_of(tmp_path / "gone") == "unknown"


@pytest.mark.parametrize(("noted", "state"), [("the id\n", "died"), ("", "unknown")])
def test_a_machine_that_was_renamed_is_the_same_machine(tmp_path, monkeypatch, noted, state):
    """Its job died before; where there is no machine-id, the name is all that is known."""
    monkeypatch.setattr(process, "MACHINE_ID", tmp_path / "machine-id")
    process.MACHINE_ID.write_text(noted)
    run = Run.create(tmp_path / "runs", "train")
    info = read_run_json(run.folder)
    assert "the id" not in json.dumps(info)  # it is confidential
    files.write_json_atomic(run.folder / "run.json", info | {"pid": 1, "identity": "gone:1"})
    assert state_of(run.folder) == "died"
    monkeypatch.setattr(platform, "node", lambda: "renamed")
    assert state_of(run.folder) == state


def test_a_job_that_runs_here_is_running_whatever_the_machine_is_called_by_now(tmp_path, monkeypatch):
    run = Run.create(tmp_path, "train")
    monkeypatch.setattr(platform, "node", lambda: "renamed")
    assert state_of(run.folder) == "running"


@pytest.mark.parametrize(
    ("content", "state", "problem"),
    [
        (b"{damaged", "unknown", "run.json: not valid JSON"),
        (b"[1, 2]", "unknown", "run.json: not valid JSON: expected an object, found list"),
        (b'{"id": 7, "pid": "4711", "options": [], "started": 1}', "died", "run.json: id is a number, expected text"),
        (b'{"pid": true, "command": "train"}', "died", "run.json: pid is true or false, expected a whole number"),
        (b'{"started": 1e400, "pid": 1e400, "v": 1}', "died", "run.json: started is no finite number, expected a time"),
        (b'{"started": 1e15, "v": 1}', "died", "run.json: started is a number, expected a time"),
        (b'{"options": {"run_name": 3}, "command": null, "pid": null, "started": 1}', "died", ""),
        (b'\xef\xbb\xbf{"command": "merge", "started": 2.0}', "died", ""),
        (b"[" * 100_000, "unknown", "run.json: not valid JSON: nested too deeply"),
    ],
)
def test_a_bad_run_json_is_named_and_takes_nothing_else_down(tmp_path, monkeypatch, capsys, content, state, problem):
    with Run.create(tmp_path / "runs", "train") as good:
        good.emit("metric", step=3)
    bad = tmp_path / "runs" / "20260101-000000-train-bad"
    bad.mkdir()
    (bad / "run.json").write_bytes(content)
    rows = {row.id: row for row in history.list_runs(tmp_path / "runs")}
    assert rows[good.id].state == "finished" and rows[good.id].steps == 3 and rows[good.id].problem == ""
    assert rows[bad.name].state == state and rows[bad.name].problem.startswith(problem)
    monkeypatch.chdir(tmp_path)
    assert main.main(["runs"]) == 0
    assert not problem or f"{bad.name}/{problem}"[:60] in capsys.readouterr().out.replace("\n", " ")
    assert main.main(["follow", bad.name]) == 1
    assert main.main(["stop", bad.name]) == 0
    assert main.main(["runs", "--json"]) == 0


def test_what_is_wrong_with_an_event_is_said_with_line_and_field(tmp_path, monkeypatch, capsys):
    with Run.create(tmp_path / "runs", "train") as run:
        run.emit("metric", step="seven", loss=1.5)
        with open(run.folder / "events.jsonl", "ab") as file:
            file.write(b'{"half": \n\n[]\n')
    tail = EventTail(run.folder / "events.jsonl")
    metric, finished = tail.read()
    assert metric["loss"] == 1.5 and "step" not in metric and finished["kind"] == "finished"
    assert tail.damaged == 3
    assert tail.problems[0] == "line 1: step is text, expected a number"
    assert tail.problems[1].startswith("line 2: ") and tail.problems[2].startswith("line 4: ")
    monkeypatch.chdir(tmp_path)
    assert main.main(["follow", "last"]) == 0
    assert "events.jsonl: line 1: step is text, expected a number; left out" in capsys.readouterr().err.replace(
        "\n", " "
    )


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
EVENT = st.builds(
    lambda kind, fields: {"kind": kind, **fields},
    st.sampled_from((*DRAWN, "gpu", "memory")),
    st.dictionaries(
        st.sampled_from((*events.FIELDS, "choices", "predicted", "eval_loss", "others", "other_gpus")), ANYTHING
    ),
)
INFO = st.dictionaries(st.sampled_from((*RUN_FIELDS, "run_name")), ANYTHING)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(INFO, st.lists(EVENT, max_size=8), ANYTHING)
def test_no_run_of_any_shape_ends_a_command_in_a_traceback(tmp_path_factory, monkeypatch, info, lines, name):
    workspace = tmp_path_factory.mktemp("any")
    run = workspace / "runs" / "20260101-000000-train-any"
    run.mkdir(parents=True)
    document = info | {"options": {"run_name": name}, "started": info.get("started", 1)}
    (run / "run.json").write_text(json.dumps(document))
    end = {"kind": "finished", "state": "finished", "exit_code": 0}
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, end]))
    monkeypatch.setattr(main, "failed", lambda program, argv, error, debug: pytest.fail(f"{argv}: {error!r}"))
    for words in (["runs"], ["runs", "--json"], ["follow", run.name], ["stop", run.name]):
        assert main.main([*words, "--workspace", str(workspace)]) in (0, 1)


@pytest.mark.parametrize("after", [0, 3])
def test_a_long_last_event_ends_a_run_all_the_same(tmp_path, after):
    with Run.create(tmp_path, "evaluate") as run:
        for step in range(100):
            run.emit("metric", step=step, loss=1.0)
        run.result = {"text": "x" * 200_000}
    with open(run.folder / "events.jsonl", "ab") as file:
        file.write(b'{"kind": "gpu"}\n' * after)
    assert state_of(run.folder) == "finished"
    assert history.last_step(run.folder) == 99


def test_an_event_may_name_a_file_whose_name_is_no_utf8(tmp_path):
    with Run.create(tmp_path, "merge") as run:
        run.emit("warning", text=os.fsdecode(b"caf\xe9/x.safetensors"))
    warning, _ = EventTail(run.folder / "events.jsonl").read()
    assert warning["text"] == "caf\\udce9/x.safetensors"


@pytest.mark.parametrize("lost", ["folder", "run.json"])
def test_a_job_whose_folder_was_deleted_is_listed_and_can_be_stopped(tmp_path, lost):
    wait = "import time; print('up', flush=True); time.sleep(60)"
    folder = tmp_path / "runs" / "20260102-030405-check-data-abc"
    folder.mkdir(parents=True)
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {wait!r}])"
    environment = os.environ | {process.RUN_VARIABLE: str(folder)}
    job = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, env=environment)
    try:
        assert job.stdout.readline() == b"up\n"
        if lost == "folder":
            folder.rmdir()
        else:
            (folder / "run.json").write_text("{damaged")
        (row,) = history.list_runs(tmp_path / "runs")
        assert (row.id, row.command, row.state) == (folder.name, "check-data", "running")
        assert time.strftime("%H%M%S", time.localtime(row.started)) == "030405"
        assert history.list_runs(tmp_path) == [], "it is no run of another workspace"
        found = history.find_run("20260102", [tmp_path / "runs"])
        assert found == folder and process.job_processes()[str(folder)][0] == job.pid
        (child,) = psutil.Process(job.pid).children()
        assert launch.stop(found, grace_s=5) == "stopped"
        assert job.wait(5) == -signal.SIGTERM
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
        assert [row.state for row in history.list_runs(tmp_path / "runs")] == (["unknown"] if folder.is_dir() else [])
    finally:
        job.kill()
        job.wait()


@pytest.mark.parametrize("skew_s", [-3600, 3600])
def test_a_launch_of_another_time_is_not_starting(tmp_path, skew_s):
    """Also one of the future, which `stop` and `follow` would wait for."""
    info = {"command": "train", "host": platform.node(), "pid": None, "started": time.time() + skew_s}
    files.write_json_atomic(tmp_path / "run.json", info)
    assert state_of(tmp_path) == "died"


def test_a_launched_job_is_found_without_its_folder(tmp_path):
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)")  # stands in for our command line
    folder = launch.launch("train", [], tmp_path, module="sleeper")
    until(lambda: str(folder) in process.job_processes(), 10)
    shutil.rmtree(folder)
    (row,) = history.list_runs(tmp_path / "runs")
    assert (row.id, row.state) == (folder.name, "running")
    assert launch.stop(history.find_run("last", [tmp_path / "runs"]), grace_s=5) == "stopped"
    assert str(folder) not in process.job_processes()


def test_a_job_that_is_starting_is_stopped_too(tmp_path):
    """It has said no pid yet: to say "not running" would leave it to run."""
    folder = tmp_path / "20260101-000000-train-abc"
    folder.mkdir()
    info = {"v": 1, "id": folder.name, "host": platform.node(), "started": time.time()}
    files.write_json_atomic(folder / "run.json", {**info, "pid": None})
    job = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    whole = {**info, "pid": job.pid, "identity": process.process_identity(job.pid)}
    speaks = threading.Timer(0.5, lambda: files.write_json_atomic(folder / "run.json", whole))
    speaks.start()
    assert launch.stop(folder) == "died"
    assert job.wait() == -signal.SIGTERM


@pytest.mark.parametrize("gone_before", ["children are listed", "the signal"])
def test_a_job_that_ends_while_it_is_being_stopped_is_no_error(tmp_path, monkeypatch, gone_before):
    run = Run.create(tmp_path, "train")
    identity = process.process_identity(os.getpid())
    monkeypatch.setattr(launch, "process_identity", lambda pid: identity)

    def gone(*_, **__):
        run.emit("finished", state="finished", exit_code=0, result={})
        raise psutil.NoSuchProcess(os.getpid()) if gone_before == "children are listed" else ProcessLookupError

    if gone_before == "children are listed":
        monkeypatch.setattr(psutil.Process, "children", gone)
    else:
        monkeypatch.setattr(os, "kill", gone)
    assert launch.stop(run.folder) == "finished"


def test_an_error_with_brackets_is_followed_as_it_is(tmp_path, monkeypatch, capsys):
    """rich would take [/x] for its own markup."""
    run = Run.create(tmp_path / "runs", "train")
    with pytest.raises(SurgvqaError), run:
        raise SurgvqaError("no key [/x] in C:\\data\\ [red] :warning:")
    monkeypatch.chdir(tmp_path)
    assert main.main(["follow", "last"]) == 1
    assert "error: no key [/x] in C:\\data\\ [red] :warning:" in capsys.readouterr().err


def test_what_is_no_regular_file_keeps_nobody_waiting(tmp_path):
    """A FIFO's reader waits for ever, a device has no end: neither takes the run list down."""
    for name in ("run.json", "events.jsonl"):
        folder = tmp_path / f"r-{name}"
        folder.mkdir()
        if name != "run.json":
            (folder / "run.json").write_text('{"id": "r", "started": 1.0, "pid": 1}')
        os.mkfifo(folder / name)
    (tmp_path / "r-device").mkdir()
    (tmp_path / "r-device/run.json").symlink_to("/dev/zero")
    found = {run.id: run for run in history.list_runs(tmp_path)}
    assert found["r-run.json"].problem == found["r-device"].problem == "run.json: no regular file"
    assert found["r-events.jsonl"].state == "died" and EventTail(tmp_path / "r-events.jsonl/events.jsonl").read() == []
