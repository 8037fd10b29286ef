"""Following a job behind a real sshd, over connections that do what connections do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from sshd import TRAIN, Relay, cmdline, laptop, start, stub_train  # noqa: F401
from waiting import until

from remote.agent import protocol
from remote.jobs import launch
from remote.jobs.run_events import RunEvents
from remote.ssh import timeouts
from remote.ssh.errors import Unreachable
from remote.ssh.patience import Patience
from remote.ssh.replies import Replies
from surgvqa.runs.process import process_identity

pytestmark = pytest.mark.slow


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


def test_events_come_while_the_job_goes_on(host):
    """Not at its end: half-way it has written fewer than all the steps that are left."""
    behind = {}
    with host.connect() as remote:
        run = start(remote, "--max_steps", "40")
        for event in RunEvents(remote, run):
            if event["kind"] == "metric":
                written = (host.there / "runs" / run / "events.jsonl").read_text().count('"metric"')
                behind[event["step"]] = written - event["step"]
    assert list(behind) == list(range(1, 41)) and min(behind[step] for step in range(10, 21)) < 20


@pytest.mark.parametrize("beats", [0, 1, 500])
def test_a_job_that_says_nothing_is_told_from_a_lost_connection(beats):
    """The agent beats while its job is silent; only a silence of the agent itself is a loss."""
    assert timeouts.SILENCE_S >= 3 * protocol.BEAT_S
    named = SimpleNamespace(name="gpuhost", entry=SimpleNamespace(python="python3", login_timeout_s=5.0))

    def chunks():
        yield Replies.MARK, b"", None
        for number in range(beats):
            yield b'{"beat": %d}\n' % number, b"", None
        yield b'{"file": "log.txt", "at": 0, "text": "x"}\n', b"", None
        raise TimeoutError

    heard = iter(Replies(named, chunks()))
    assert next(heard)["text"] == "x"
    with pytest.raises(Unreachable, match=r"connection lost, no answer for \d+ s"):
        next(heard)


def test_following_survives_dropped_connections_without_loss(host):
    """sshd's sessions are killed, later the whole sshd for a second; every event arrives exactly once."""
    with host.connect() as remote:
        run = start(remote, "--max_steps", "100")
        follower = RunEvents(remote, run)
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
    monkeypatch.setattr(timeouts, "SILENCE_S", 5.0)  # two beats are missing: time saved
    relay = Relay(host.server.port)
    host.server.write_config(port=relay.port)
    with host.connect() as remote:
        run = start(remote)
        follower = RunEvents(remote, run)
        seen = iter(follower)
        until(lambda: next(seen)["kind"] == "metric" and follower.state == "running")
        relay.freeze()
        event = next(e for e in seen if e["kind"] == "connection")
        assert event["state"] == "unreachable"
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
        seen = list(RunEvents(remote, run))
    assert [e["step"] for e in seen if e["kind"] == "metric"] == list(range(1, 21))
    assert not [e for e in seen if e["kind"] == "connection"]
    relay.close()


def test_the_host_gone_for_good_can_be_given_up(host):
    with host.connect() as remote:
        run = start(remote, "--max_steps", "100000")
        host.server.stop()
        with pytest.raises(Unreachable):
            list(RunEvents(remote, run, patience=Patience(1.0)))
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
        follower = RunEvents(remote, "last")
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
