"""Launching under a real systemd user manager that lingers (in namespaces of its own), behind a real sshd."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from places import ROOT
from sshd import TRAIN, laptop, start, stub_train  # noqa: F401
from waiting import until

from remote.jobs import launch
from remote.jobs.run_events import RunEvents

pytestmark = pytest.mark.slow

MANAGER = Path("/lib/systemd/systemd")
SCRIPT = ROOT / "tests/kits/user_manager.sh"


def cgroup2() -> Path | None:
    """Where the unified cgroup hierarchy is mounted."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return next((Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"), None)


@pytest.fixture
def host(laptop):  # noqa: F811
    """The host of `laptop` with a user manager beside its sshd, and a workspace whose name systemd would expand."""
    at = cgroup2()
    if os.getuid() != 0 or not MANAGER.exists() or not shutil.which("systemd-run") or at is None:
        pytest.skip("needs root, systemd and a cgroup2 mount")
    laptop.server.stop()
    try:
        laptop.server.start(within=["bash", str(SCRIPT), str(at)])
    except RuntimeError as error:
        pytest.skip(f"no user manager can be run here: {str(error).splitlines()[-1:]}")
    stub_train(laptop)
    name = "~/it's $HOME 100%n"
    (laptop.server.home / "surgvqa").rename(laptop.server.home / name[2:])
    laptop.host(venv=str(laptop.root / "host" / "venv"), workspace=name)
    yield laptop
    pid = laptop.server.process.pid
    laptop.server.stop()
    own = at / f"surgvqa-test-{pid}"
    until(lambda: not (own / "cgroup.procs").exists() or not (own / "cgroup.procs").read_text())
    for folder, _, _ in os.walk(own, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def said(remote, *argv: str) -> str:
    """What a program on the host prints: it sees the host's processes, we do not."""
    return "\n".join(m["line"] for m in remote.stream("execute", argv=list(argv)) if "line" in m)


def test_a_job_is_a_unit_of_its_own_and_outlives_the_logout(host):
    folder = host.server.home / "it's $HOME 100%n" / "runs"
    with host.connect() as remote:
        run = start(remote, "--run_name", "children")
        pid = json.loads((folder / run / "supervisor.json").read_text())["pid"]
        assert f"surgvqa-{run}.service" in said(remote, "cat", f"/proc/{pid}/cgroup")
        until(lambda: remote.call("runs", run=run)["state"] == "running")
    host.server.kill_sessions()
    seen = (folder / run / "events.jsonl").stat().st_size
    until(lambda: (folder / run / "events.jsonl").stat().st_size > seen)  # it goes on
    with host.connect() as remote:
        answer = launch.stop(remote, run, grace_s=5)
        assert answer["state"] == "stopped" and answer["exit"]["swept"] >= 3
        units = ["env", "XDG_RUNTIME_DIR=/run/user/0", "systemctl", "--user", "list-units", "--all", "--no-legend"]
        # On a busy machine the manager may take its stop timeout, 90 s, to see that the unit's cgroup is empty.
        until(lambda: f"surgvqa-{run}" not in said(remote, *units), 150)
        assert str(folder) not in said(remote, "ps", "-eo", "args")


def test_without_its_manager_the_supervisor_starts_by_itself(host):
    with host.connect() as remote:
        said(remote, "kill", "-KILL", said(remote, "cat", "/run/user/0/manager.pid"))
        run = start(remote, "--max_steps", "2")
        events_there = RunEvents(remote, run)
        assert list(events_there) and events_there.state == "finished"
