"""Launching, following and stopping jobs on a host behind a real sshd."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sshd import TRAIN, Relay, cmdline, laptop, start, stub_train  # noqa: F401
from waiting import until

from remote.cli.main import main
from remote.cli.parser import split_job
from remote.jobs import launch
from remote.jobs.run_events import RunEvents
from remote.ssh import patience
from remote.ssh.errors import Unreachable
from remote.ssh.patience import Patience
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs.process import descendants, process_identity

pytestmark = pytest.mark.slow


def supervisor_of(host, run):
    return json.loads((host.there / "runs" / run / "supervisor.json").read_text())


def test_a_job_runs_to_its_end_and_says_how(host):
    with host.connect() as remote:
        run = start(remote, "--max_steps", "5")
        follower = RunEvents(remote, run)
        events = list(follower)
    assert [e["step"] for e in events if e["kind"] == "metric"] == [1, 2, 3, 4, 5]
    assert "training starts" in "".join(e["text"] for e in events if e["kind"] == "log")
    assert follower.state == "finished" and follower.outcome["exit"]["exit_code"] == 0
    assert not (host.there / "runs" / run / "start.json").exists()


def test_a_launch_whose_answer_was_lost_starts_one_job(host, monkeypatch):
    """It is asked for again, and the host knows it by its token."""
    with host.connect() as remote:
        remote.patience, stream, lost = Patience(30), remote.stream, []
        monkeypatch.setattr(patience, "BACKOFF_S", (0,))

        def lose_the_first(op, **params):
            answers = list(stream(op, **params))
            if op == "launch" and not lost:
                lost.append(answers)
                raise Unreachable("the answer was lost")
            return answers

        monkeypatch.setattr(remote, "stream", lose_the_first)
        run = start(remote, "--max_steps", "1")
        assert [one["run"] for one in lost[0]] == [run]
        assert [row["id"] for row in remote.call("runs")["runs"]] == [run]


def test_a_launch_that_broke_off_before_its_job_is_begun_anew(tmp_path):
    from remote.agent import jobs as on_host

    torn = tmp_path / "runs" / "20260101-000000-train-0a"
    torn.mkdir(parents=True)
    for name in ("start.json", "run.json"):
        (torn / name).write_text("{}")
    assert on_host._launched_before(str(tmp_path), "train", "0b") is None and torn.exists()
    assert on_host._launched_before(str(tmp_path), "train", "0a") is None and not torn.exists()
    torn.mkdir()
    (torn / "supervisor.json").write_text('{"state": "running"}')
    assert on_host._launched_before(str(tmp_path), "train", "0a") == torn


def test_a_job_outlives_connection_client_and_sshd(host):
    with host.connect() as remote:
        run = start(remote)
        until(lambda: remote.call("runs", run=run)["state"] == "running")
    before = supervisor_of(host, run)
    host.server.stop()
    time.sleep(0.5)
    assert process_identity(before["pid"]) == before["identity"]
    host.server.start()
    with host.connect() as remote:
        assert remote.call("runs", run="last")["state"] == "running"
        assert launch.stop(remote, run, grace_s=5)["state"] == "stopped"
    assert process_identity(before["pid"]) is None


def test_stop_leaves_nothing_of_the_job_and_touches_nothing_else(host):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=host.root)
    with host.connect() as remote:
        run = start(remote, "--run_name", "children deaf")
        folder = host.there / "runs" / run
        until(lambda: (folder / "events.jsonl").exists() and len(descendants(supervisor_of(host, run)["pid"])) == 4)
        family = descendants(supervisor_of(host, run)["pid"])
        answer = launch.stop(remote, run, grace_s=1.0)
    assert answer["state"] == "stopped" and answer["exit"]["signal"] == signal.SIGKILL
    assert [p for p in family if process_identity(p)] == []
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


@pytest.mark.parametrize("differs", ["start time", "boot"])
def test_stop_with_a_stale_pid_touches_nobody(host, differs):
    """The run's pid now belongs to another process: its start time differs, or the machine was started anew."""
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=host.root)
    folder = host.there / "runs" / "20260101-000000-train-abc"
    folder.mkdir(parents=True)
    boot, started = process_identity(stranger.pid).split(":")
    identity = f"{boot}:1" if differs == "start time" else f"{boot[::-1]}:{started}"
    stale = {"pid": stranger.pid, "identity": identity}
    (folder / "run.json").write_text(json.dumps({"id": folder.name, "command": "train", "started": 1, **stale}))
    (folder / "supervisor.json").write_text(json.dumps(stale))
    with host.connect() as remote:
        assert launch.stop(remote, "last", grace_s=0.5)["state"] == "died"
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_killed_job_is_dead_and_says_by_what(host):
    with host.connect() as remote:
        run = start(remote, "--run_name", "killed")
        follower = RunEvents(remote, run)
        events = list(follower)
    assert follower.state == "died" and follower.outcome["exit"]["signal"] == 9
    assert any(e["kind"] == "error" and "SIGKILL" in e["text"] for e in events)


def test_a_failing_job_fails(host):
    with host.connect() as remote:
        follower = RunEvents(remote, start(remote, "--run_name", "fails"))
        events = list(follower)
    assert follower.state == "failed" and follower.outcome["exit"]["exit_code"] == 1
    assert any(e["kind"] == "error" and "no such luck" in e["text"] for e in events)


def test_the_supervisor_killed_does_not_hide_the_job(host):
    with host.connect() as remote:
        run = start(remote)
        until(lambda: remote.call("runs", run=run)["state"] == "running")
        os.kill(supervisor_of(host, run)["pid"], signal.SIGKILL)
        assert remote.call("runs", run=run)["state"] == "running"
        with pytest.raises(SurgvqaError, match=run):  # the job itself still holds the GPU
            start(remote)
        assert launch.stop(remote, run, grace_s=5)["state"] == "stopped"


def test_one_job_has_the_gpu(host):
    """Eight launches at once, each over a connection of its own: exactly one starts."""
    started, refused = [], []

    def one():
        with host.connect() as remote:
            try:
                started.append(start(remote))
            except SurgvqaError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1 and len(refused) == 7
    assert all(started[0] in text and "--share" in text for text in refused), refused
    with host.connect() as remote:
        assert [r["id"] for r in remote.call("runs")["runs"]] == started  # the refused left no folder
        second = start(remote, share=True)
        for run in (started[0], second):
            launch.stop(remote, run, grace_s=5)
        third = start(remote, "--max_steps", "1")
        assert RunEvents(remote, third).__iter__() and list(RunEvents(remote, third))


def test_sessions_with_other_temporary_folders_share_the_lock(host):
    """pam_namespace and Slurm give each session a TMPDIR of its own; the GPU is the same."""
    with host.connect() as remote:
        run = start(remote)
    (host.root / "other").mkdir()
    host.server.stop()
    host.server.environment = f"TMPDIR={host.root / 'other'}"
    file = host.server.root / "sshd_config"
    host.server.start()
    if f"TMPDIR={host.root / 'other'}" not in file.read_text():
        pytest.fail("the second session has the first one's TMPDIR")
    with host.connect() as remote:
        with pytest.raises(SurgvqaError, match=run):
            start(remote)
        launch.stop(remote, run, grace_s=5)


def test_a_job_whose_folder_was_deleted_is_listed_and_can_be_stopped(host):
    with host.connect() as remote:
        run = start(remote)
        until(lambda: remote.call("runs", run=run)["state"] == "running")
        pids = [supervisor_of(host, run)["pid"], *descendants(supervisor_of(host, run)["pid"])]
        before = {pid: process_identity(pid) for pid in pids}
        folder = host.there / "runs" / run  # into which the job writes meanwhile
        until(lambda: shutil.rmtree(folder, ignore_errors=True) or not folder.exists())
        (row,) = remote.call("runs")["runs"]
        assert (row["id"], row["state"]) == (run, "running")
        assert launch.stop(remote, run, grace_s=5)["state"] == "stopped"
        until(lambda: not any(process_identity(pid) == identity for pid, identity in before.items()))
        assert remote.call("runs")["runs"] == []
        launch.stop(remote, start(remote), grace_s=5)  # the GPU is free again


def test_a_gpu_that_somebody_else_computes_on_is_not_shared(host):
    """nvidia-smi shows a process of no run of ours on GPU 0; GPU 1 is free."""
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=host.root)
    tools = host.server.home / "bin"
    tools.mkdir()
    rows = f'*index,uuid*) printf "0, GPU-a\\n1, GPU-b\\n";; *compute-apps*) echo "{stranger.pid}, GPU-a, 30000";;'
    (tools / "nvidia-smi").write_text(f'#!/bin/sh\ncase "$*" in {rows} esac\n')
    (tools / "nvidia-smi").chmod(0o755)
    host.server.stop()
    host.server.environment = f"PATH={tools}:/usr/bin:/bin"
    host.server.start()
    with host.connect() as remote, pytest.raises(SurgvqaError, match=f"GPU busy: process {stranger.pid} takes 30000"):
        start(remote)
    with open(host.workspace / "hosts.toml", "a") as file:
        file.write('[gpuhost.environment]\nCUDA_VISIBLE_DEVICES = "1"\n')
    with host.connect() as remote:
        run = start(remote)
        with pytest.raises(SurgvqaError, match=run):  # now GPU 1 is taken as well
            start(remote)
        launch.stop(remote, run, grace_s=5)
    stranger.kill()
    stranger.wait()


def test_secrets_and_environment_arrive_and_leave_no_trace(host, monkeypatch):
    secret = "k3y-with-$(id)-and-'quotes'"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    host.host(venv=str(host.root / "host" / "venv"), python=sys.executable)
    with open(host.workspace / "hosts.toml", "a") as file:
        file.write('[gpuhost.environment]\nODD = "a b $(touch /tmp/never) \\n x"\n')
    with host.connect() as remote:
        run = start(remote)
        folder = host.there / "runs" / run
        until(lambda: (folder / "argv.txt").exists())
        below = [supervisor_of(host, run)["pid"], *descendants(supervisor_of(host, run)["pid"])]
        lines = b"".join(map(cmdline, below))
        launch.stop(remote, run, grace_s=5)
    env = eval((folder / "env.txt").read_text())
    assert env["WANDB_API_KEY"] == secret and env["ODD"] == "a b $(touch /tmp/never) \n x"
    assert secret.encode() not in lines and not Path("/tmp/never").exists()
    (folder / "env.txt").unlink()  # the stub's own
    for file in folder.rglob("*"):
        assert secret not in file.read_text(errors="replace"), file


def test_launch_refuses_what_is_not_there(host):
    with host.connect() as remote, pytest.raises(UsageError, match=r"elsewhere is not in .* upload first"):
        launch.launch(remote, "train", [], needs=["elsewhere"])
    (host.there / ".surgvqa" / "ready").mkdir(parents=True)
    (host.there / ".surgvqa" / "ready" / "merged.json").write_text('{"state": "publishing", "files": {}}')
    with host.connect() as remote, pytest.raises(SurgvqaError, match="did not come to its end"):
        launch.launch(remote, "train", [], needs=["merged"])


def test_local_paths_become_the_hosts(host):
    from surgvqa.config.workspace import load_workspace

    workspace = load_workspace(host.workspace)
    argv = [
        "--model_name_or_path",
        str(host.workspace / "models" / "merged"),
        "--frames_dir=/data/my frames",
        "--seed",
        "1",
    ]
    turned, needs = launch.paths_for_host("train", argv, workspace)
    assert turned == ["--model_name_or_path", "models/merged", "--frames_dir=my frames", "--seed", "1"]
    assert needs == ["models/merged", "my frames"]


@pytest.mark.parametrize(
    ("argv", "turned", "needs"),
    [
        (["--feature_cache_dir", "cache"], ["--feature_cache_dir", "cache"], []),  # the job makes it
        (["--eval_data_path", "none"], ["--eval_data_path", "none"], []),
        (["--eval_data_path=none"], ["--eval_data_path=none"], []),
        (["--eval_audio_dir="], ["--eval_audio_dir="], []),
        (["--do_eval", "--frames_dir", "a"], ["--do_eval", "--frames_dir", "a"], ["a"]),
    ],
)
def test_what_is_no_input_need_not_be_there(tmp_path, monkeypatch, argv, turned, needs):
    from surgvqa.config.workspace import load_workspace

    monkeypatch.chdir(tmp_path)
    assert launch.paths_for_host("train", argv, load_workspace(tmp_path)) == (turned, needs)


@pytest.mark.parametrize("argv", [["--checkpoint", "last"], ["--checkpoint=last"]])
def test_a_run_id_of_the_host_is_no_path(tmp_path, monkeypatch, argv):
    from surgvqa.config.workspace import load_workspace

    monkeypatch.chdir(tmp_path)
    assert launch.paths_for_host("evaluate", argv, load_workspace(tmp_path)) == (argv, [])


@pytest.mark.parametrize(
    ("argv", "ours", "job"),
    [
        ("launch h train --seed 1", "launch h", "train --seed 1"),
        ("launch h --workspace demo train", "launch h --workspace demo", "train"),
        ("launch --workspace train --share h merge", "launch --workspace train --share h", "merge"),
        ("launch --workspace=demo h train", "launch --workspace=demo h", "train"),
        ("launch train train", "launch train", "train"),
        (
            "launch h train --follow --workspace demo --seed 1 --accept_new_host_key --json",
            "launch h --follow --workspace demo --accept_new_host_key --json",
            "train --seed 1",
        ),
        ("launch h train --detach", "launch h --detach", "train"),
        (
            "launch h --then fetch,terminate train --max_cost 5 --seed 1 --sync",
            "launch h --then fetch,terminate --max_cost 5 --sync",
            "train --seed 1",
        ),
        ("launch h trian --seed 1", "launch h", "trian --seed 1"),
        ("launch h", "launch h", ""),
        ("stop h train", "stop h train", ""),
    ],
)
def test_words_for_us_and_words_for_the_job(argv, ours, job):
    assert split_job(argv.split()) == (ours.split(), job.split())


def test_a_resumed_job_has_its_own_run_id_alone():
    """With the old one's a failure at its start would be told to the old run's folder."""
    argv = ["--seed", "1", "--workspace", "/a", "--run_id=old", "--resume", "older", "--run_id", "old", "--bf16"]
    assert launch.resume_argv(argv, "old") == ["--seed", "1", "--bf16", "--resume", "old"]


def test_a_disk_that_fills_up_while_a_job_is_launched_keeps_no_secret(tmp_path, monkeypatch):
    from remote.agent import jobs as on_host

    dump = json.dump

    def full(document, file, **options):
        if "env" in document:
            file.write("the key")
            file.flush()
            raise OSError(28, "No space left on device")
        dump(document, file, **options)

    monkeypatch.setattr(json, "dump", full)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").touch()
    asked = {
        "command": "train",
        "argv": [],
        "needs": [],
        "env": {},
        "secrets": {"K": "the key"},
        "exclusive": False,
        "token": "0a",
    }
    with pytest.raises(OSError, match="No space left"):
        on_host.launch(None, str(tmp_path), "venv", **asked)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("command", ["audit", "ask", "budget", "check-data", "demo", "host"])
def test_what_is_no_job_is_not_launched(tmp_path, monkeypatch, capsys, command):
    """It would refuse the run folder on the host, and nobody would see why."""
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "gpuhost", command, "x"]) == 2
    assert "merge, train, evaluate" in capsys.readouterr().err
    with pytest.raises(UsageError):
        launch.launch(None, command, [], needs=[])


def test_names_are_utf8_in_a_latin_1_locale_too(host):
    """As they are here, whatever the host's locale: in the upload, in the job, and on the way home."""
    locale = host.root / "de_DE.ISO-8859-1"
    made = shutil.which("localedef") and subprocess.run(["localedef", "-i", "de_DE", "-f", "ISO-8859-1", locale])
    if not made or made.returncode:
        pytest.skip("no localedef, or no locales to make one from (apt-get install locales)")
    host.server.stop()
    host.server.environment = f"LC_ALL={locale.name} LOCPATH={host.root}"
    host.server.start()
    (host.workspace / "ü€").mkdir()
    (host.workspace / "ü€" / "中.json").write_text("{}")
    host.here("upload", "gpuhost", "--model_name_or_path", "ü€")
    assert (host.there / "ü€" / "中.json").read_text() == "{}"
    run = host.here("launch", "gpuhost", "--wait", *TRAIN, "--max_steps", "1", "--run_name", "ü€ 中")["run"]
    assert host.here("runs", "gpuhost")["runs"][0]["name"] == "ü€ 中"
    host.here("fetch", "gpuhost", run)
    assert (
        json.loads((host.workspace / "runs" / run / "run.json").read_text())["options"]["run_name"]["value"] == "ü€ 中"
    )


def test_runs_shows_those_started_by_hand_and_clocks_do_not_matter(host, monkeypatch):
    folder = host.there / "runs" / "20260101-000000-train-abc"
    folder.mkdir(parents=True)
    by_hand = subprocess.Popen(
        [str(host.root / "host" / "venv" / "bin" / "python"), "-m", "surgvqa", *TRAIN, "--workspace", "."],
        cwd=host.there,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)  # our clock is an hour behind the host's
    with host.connect() as remote:
        until(lambda: any(r["state"] == "running" for r in remote.call("runs")["runs"]))
        run = next(r for r in remote.call("runs")["runs"] if r["state"] == "running")
        seen = iter(RunEvents(remote, run["id"]))
        assert next(e for e in seen if e["kind"] == "metric")
        seen.close()
        assert launch.stop(remote, run["id"], grace_s=5)["state"] == "stopped"
    assert by_hand.wait(5) is not None


def test_the_command_line_launches_lists_stops_and_resumes(host):
    (host.there / ".surgvqa").mkdir(exist_ok=True)
    launched = host.here("launch", "gpuhost", *TRAIN, "--max-steps", "100000")
    run = launched["run"]
    listed = host.here("runs", "gpuhost")["runs"]
    assert [(r["id"], r["command"]) for r in listed] == [(run, "train")]
    stopped = host.here("stop", "gpuhost", run[:20])
    assert stopped["state"] == "stopped"
    again = host.here("resume", "gpuhost", "last")["run"]
    until(lambda: (host.there / "runs" / again / "argv.txt").exists())
    argv = eval((host.there / "runs" / again / "argv.txt").read_text())
    assert argv[argv.index("--resume") + 1] == run and argv[argv.index("--max_steps") + 1] == "100000"
    host.command("stop", "gpuhost", again)
    assert host.command("follow", "gpuhost", "nothing", check=2).stderr.count("\n") == 1
