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
from types import SimpleNamespace

import pytest
from sshd import TRAIN, Relay, laptop, start, stub_train  # noqa: F401
from waiting import until

from remote.cli.main import main
from remote.cli.parser import split_job
from remote.jobs import launch
from remote.jobs.follower import Follower
from remote.ssh import connection, timeouts
from remote.ssh.errors import Unreachable
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs.process import descendants, process_identity

pytestmark = pytest.mark.slow


@pytest.fixture
def host(laptop):  # noqa: F811
    stub_train(laptop)
    return laptop


def supervisor_of(host, run):
    return json.loads((host.there / "runs" / run / "supervisor.json").read_text())


def test_a_job_runs_to_its_end_and_says_how(host):
    with host.connect() as remote:
        run = start(remote, "--max_steps", "5")
        follower = Follower(remote, run)
        events = list(follower)
    assert [e["step"] for e in events if e["kind"] == "metric"] == [1, 2, 3, 4, 5]
    assert "training starts" in "".join(e["text"] for e in events if e["kind"] == "log")
    assert follower.state == "finished" and follower.outcome["exit"]["exit_code"] == 0
    assert not (host.there / "runs" / run / "start.json").exists()


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
        follower = Follower(remote, run)
        events = list(follower)
    assert follower.state == "died" and follower.outcome["exit"]["signal"] == 9
    assert any(e["kind"] == "error" and "SIGKILL" in e["text"] for e in events)


def test_following_waits_for_what_the_supervisor_says_of_a_killed_job(tmp_path):
    """The job is gone a moment before its supervisor has written by what."""
    from remote.agent import runs

    folder = tmp_path / "runs" / "20260101-000000-train-abc"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": folder.name, "command": "train", "pid": 1, "identity": "gone"}))
    (folder / "events.jsonl").write_text('{"v": 1, "t": 1.0, "kind": "metric", "step": 1}\n')
    late = """
import sys, time
time.sleep(1.5)
open(sys.argv[1], "a").write('{"v": 1, "t": 2.0, "kind": "finished", "state": "died", "exit_code": null}\\n')
"""
    supervisor = subprocess.Popen([sys.executable, "-c", late, str(folder / "events.jsonl")])
    noted = {"pid": supervisor.pid, "identity": process_identity(supervisor.pid)}
    (folder / "supervisor.json").write_text(json.dumps(noted))
    threading.Thread(target=supervisor.wait).start()
    said = []
    answer = runs.follow(SimpleNamespace(say=said.append), str(tmp_path), folder.name, {})
    assert answer["state"] == "died" and answer["finished"]["t"] == 2.0
    assert '"finished"' in "".join(message.get("text", "") for message in said)


def test_a_failing_job_fails(host):
    with host.connect() as remote:
        follower = Follower(remote, start(remote, "--run_name", "fails"))
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
        assert Follower(remote, third).__iter__() and list(Follower(remote, third))


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
        shutil.rmtree(host.there / "runs" / run)
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
        lines = b"".join(Path(f"/proc/{p}/cmdline").read_bytes() for p in below)
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
        ("launch h train --detach", "launch h", "train"),  # it is one already
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
    asked = {"command": "train", "argv": [], "needs": [], "env": {}, "secrets": {"K": "the key"}, "exclusive": False}
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
    host.json("upload", "gpuhost", "--model_name_or_path", "ü€")
    assert (host.there / "ü€" / "中.json").read_text() == "{}"
    run = host.json("launch", "gpuhost", "--wait", *TRAIN, "--max_steps", "1", "--run_name", "ü€ 中")["run"]
    assert host.json("runs", "gpuhost")["runs"][0]["name"] == "ü€ 中"
    host.json("fetch", "gpuhost", run)
    assert (
        json.loads((host.workspace / "runs" / run / "run.json").read_text())["options"]["run_name"]["value"] == "ü€ 中"
    )


def test_following_lags_less_than_a_second(host):
    with host.connect() as remote:
        run = start(remote, "--max_steps", "40")
        lags = [time.time() - e["t"] for e in Follower(remote, run) if e["kind"] == "metric"]
    late = lags[10:]  # the job had begun before we listened
    assert max(late) < 1.0, lags


def test_following_survives_dropped_connections_without_loss(host):
    """sshd's sessions are killed, later the whole sshd for a second; every event arrives exactly once."""
    with host.connect() as remote:
        run = start(remote, "--max_steps", "100")
        follower = Follower(remote, run)
        steps, lost = [], 0
        for event in follower:
            if event["kind"] == "metric":
                steps.append(event["step"])
                if event["step"] == 10:
                    host.server.kill_sessions()
                elif event["step"] == 50:
                    host.server.stop()
                    threading.Timer(1.0, host.server.start).start()
            lost += event["kind"] == "connection" and event["state"] == "unreachable"
    assert steps == list(range(1, 101)) and lost >= 2 and follower.state == "finished"


def test_a_dead_link_is_unreachable_and_not_dead(host, monkeypatch):
    assert connection.Remote.stream.__defaults__ == (timeouts.SILENCE_S,) and timeouts.SILENCE_S < 20
    monkeypatch.setattr(connection.Remote.stream, "__defaults__", (5.0,))  # two beats are missing: time saved
    relay = Relay(host.server.port)
    host.server.write_config(port=relay.port)
    with host.connect() as remote:
        run = start(remote)
        follower = Follower(remote, run)
        seen = iter(follower)
        until(lambda: next(seen)["kind"] == "metric" and follower.state == "running")
        relay.freeze()
        frozen = time.monotonic()
        event = next(e for e in seen if e["kind"] == "connection")
        assert event["state"] == "unreachable" and time.monotonic() - frozen < 13
        assert follower.state == "running"  # what is not reached is not dead
        relay.thaw()
        relay.cut()
        event = next(e for e in seen if e["kind"] == "connection" and e["state"] == "connected")
        steps = [next(e for e in seen if e["kind"] == "metric")["step"] for _ in range(100)]
        assert steps == list(range(steps[0], steps[0] + 100))
        launch.stop(remote, run, grace_s=5)
    relay.close()


def test_a_slow_link_is_no_lost_one(host):
    """At 30 kB/s a request takes a second and more; nothing is given up, nothing is missed."""
    relay = Relay(host.server.port, bytes_per_s=30_000)
    host.server.write_config(port=relay.port)
    with host.connect() as remote:
        run = start(remote, "--max_steps", "20")
        seen = list(Follower(remote, run))
    assert [e["step"] for e in seen if e["kind"] == "metric"] == list(range(1, 21))
    assert not [e for e in seen if e["kind"] == "connection"]
    relay.close()


def test_the_host_gone_for_good_can_be_given_up(host):
    with host.connect() as remote:
        run = start(remote, "--max_steps", "100000")
        host.server.stop()
        with pytest.raises(Unreachable):
            list(Follower(remote, run, give_up_s=1.0))
        host.server.start()
        launch.stop(remote, run, grace_s=5)


def test_a_rotated_and_a_truncated_log_are_noticed(host):
    folder = host.there / "runs" / "20260101-000000-train-abc"
    folder.mkdir(parents=True)
    me = {"pid": os.getpid(), "identity": process_identity(os.getpid())}  # alive as long as the test
    (folder / "run.json").write_text(json.dumps({"id": folder.name, "command": "train", "started": 1, **me}))
    (folder / "log.txt").write_text("one\n")
    (folder / "events.jsonl").write_text('{"v":1,"t":1,"kind":"phase","name":"a"}\n{"v":1,"t"')
    with host.connect() as remote:
        follower = Follower(remote, "last")
        seen = iter(follower)
        texts = []

        def log(text):
            until(lambda: texts.append(next(seen)) or texts[-1].get("text") == text or texts[-1].get("name") == text)

        log("one\n")
        (folder / "log.txt").write_text("")  # truncated
        time.sleep(1.0)
        (folder / "log.txt").write_text("two\n")
        log("two\n")
        (folder / "new").write_text("a longer one\n")
        os.replace(folder / "new", folder / "log.txt")  # rotated
        log("a longer one\n")
        with open(folder / "events.jsonl", "a") as file:  # the half-written line was "not yet"
            file.write(':2,"kind":"phase","name":"b"}\n')
        log("b")
        assert follower.restarts == 2
        seen.close()


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
        seen = iter(Follower(remote, run["id"]))
        assert next(e for e in seen if e["kind"] == "metric")
        seen.close()
        assert launch.stop(remote, run["id"], grace_s=5)["state"] == "stopped"
    assert by_hand.wait(5) is not None


def test_the_command_line_launches_lists_stops_and_resumes(host):
    (host.there / ".surgvqa").mkdir(exist_ok=True)
    launched = host.json("launch", "gpuhost", *TRAIN, "--max-steps", "100000")
    run = launched["run"]
    listed = host.json("runs", "gpuhost")["runs"]
    assert [(r["id"], r["command"]) for r in listed] == [(run, "train")]
    stopped = host.json("stop", "gpuhost", run[:20])
    assert stopped["state"] == "stopped"
    again = host.json("resume", "gpuhost", "last")["run"]
    until(lambda: (host.there / "runs" / again / "argv.txt").exists())
    argv = eval((host.there / "runs" / again / "argv.txt").read_text())
    assert argv[argv.index("--resume") + 1] == run and argv[argv.index("--max_steps") + 1] == "100000"
    host.command("stop", "gpuhost", again)
    assert host.command("follow", "gpuhost", "nothing", check=2).stderr.count("\n") == 1


def test_fetch_reads_what_is_here_already(laptop):  # noqa: F811
    """A file of the right size and time is not believed: its hash is asked for, no byte of a good one is sent."""
    there = laptop.there / "runs" / "20260101-000000-train-abc"
    there.mkdir(parents=True)
    (there / "run.json").write_text('{"id": "20260101-000000-train-abc", "command": "train", "started": 1}')
    (there / "adapter.safetensors").write_bytes(b"x" * 100_000)
    laptop.json("fetch", "gpuhost", there.name)
    assert laptop.json("fetch", "gpuhost", there.name)["received_bytes"] == 0
    here = laptop.workspace / "runs" / there.name / "adapter.safetensors"
    status = here.stat()
    here.write_bytes(b"y" * 100_000)
    os.utime(here, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert laptop.json("fetch", "gpuhost", there.name)["received_bytes"] == 100_000
    assert here.read_bytes() == b"x" * 100_000
