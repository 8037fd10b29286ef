"""Launching jobs on the host."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import platform
import pwd
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from remote.agent.files import locked, unfinished, within
from remote.agent.machine import nvidia_smi
from surgvqa import files
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs.folder import new_run_id
from surgvqa.runs.process import RUN_VARIABLE, machine_id
from surgvqa.runs.ranks import node_run

UTF8 = ("-X", "utf8")  # names are what they were where they came from, whatever the locale here
OF_A_JOB = {"SURGVQA_DETACHED": "1", "PYTHONUNBUFFERED": "1"}
KILLS = "this host ends your processes at logout (KillUserProcesses): run loginctl enable-linger there"
SYSTEMD_RUN = [
    *("systemd-run", "--user", "--quiet", "--collect", "--same-dir"),
    # The supervisor ends its job itself, and notes a job that was killed for memory: nothing is to end it for that.
    *("--property=KillMode=mixed", "--property=OOMPolicy=continue"),
]


def launch(channel: Any, workspace: str, *args: Any, **asked: Any) -> dict[str, Any]:
    """As `_launch`, while nothing is removed from the workspace (remote/agent/disk.py)."""
    with locked(workspace, fcntl.LOCK_SH):
        return _launch(channel, workspace, *args, **asked)


def _launch(
    channel: Any,
    workspace: str,
    venv: str,
    command: str,
    argv: list[str],
    needs: list[str],
    env: dict[str, str],
    secrets: dict[str, str],
    exclusive: bool,
    token: str,
    node: int = 0,
    run: str = "",
) -> dict[str, Any]:
    """Starts `surgvqa COMMAND ARGV…` under a supervisor, detached from this connection. Returns the run's id.

    `needs` must exist in the workspace and be published whole. `exclusive`: refuse while another job has the GPU.
    `token`, hexadecimal, is this launch's own: asked for again, the run that it started is returned. `node`: of several
    hosts that train together, a further one; then `run` is the id that the run has on the first one.
    """
    if "/" in run or "\0" in run:
        raise UsageError(f"run {run!r}: expected an id")
    earlier = _launched_before(workspace, command, node_run(token, node))
    if earlier is not None:
        return {"run": earlier.name, "folder": str(earlier), "warning": ""}
    python = os.path.join(workspace, os.path.expanduser(venv), "bin", "python")
    if not os.path.exists(python):
        raise SurgvqaError(f"no {python}; run surgvqa-remote setup first")
    for path in needs:
        if not os.path.lexists(within(workspace, path)):
            raise UsageError(f"{path} is not in {workspace}; run surgvqa-remote upload first")
    torn = unfinished(workspace, needs)
    if torn is not None:
        raise SurgvqaError(f"the upload of {torn} did not come to its end; run surgvqa-remote upload again")
    locks = _gpu_locks(env.get("CUDA_VISIBLE_DEVICES")) if exclusive else []
    run_id = node_run(run or new_run_id(command, token), node)
    folder = Path(workspace, "runs", run_id)
    folder.mkdir(parents=True)
    _lock(folder)
    full = [command, *argv, "--workspace", workspace]
    info = {
        "v": 1,
        "id": run_id,
        "command": command,
        "argv": [command, *argv],
        "cwd": workspace,
        "host": platform.node(),
        "machine": machine_id(),
        "pid": None,
        "started": time.time(),
    }
    start = {
        "argv": [python, *UTF8, "-m", "surgvqa", *full, "--run_id", run_id],
        "cwd": workspace,
        "env": {
            **os.environ,
            **_bytecode_environment(python),
            **env,
            **secrets,
            "SURGVQA_DETACHED": "1",
            RUN_VARIABLE: str(folder),
            "PYTHONUNBUFFERED": "1",
        },
        "locks": locks,
    }
    try:
        files.write_json_atomic(folder / "run.json", info)
        descriptor = os.open(folder / "start.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(start, file)
    except OSError:
        _discard(folder)
        raise
    words = [python, *UTF8, "-m", "surgvqa.runs.supervisor", str(folder)]
    said, warning = None, ""
    if lingers() and shutil.which("systemd-run"):
        # A lingering user manager outlives every logout, whatever logind.conf says.
        escaped = [w.replace("$", "$$") for w in words]
        said = _supervised(workspace, folder, [*SYSTEMD_RUN, "--unit=surgvqa-" + run_id, "--", *escaped])
    if said is None:
        said = _supervised(workspace, folder, words) or {"state": "failed"}
        if logout_kills():
            warning = KILLS
    if said.get("state") != "running":
        reason = said.get("error") or _last_line(folder / "log.txt")
        _discard(folder)
        if said.get("state") == "busy":
            raise SurgvqaError(
                "the GPU is taken by run {}; stop it, wait, or launch with --share".format(said["holder"])
            )
        if "No module named" in reason:
            reason += "; the host has another version of surgvqa: run surgvqa-remote setup"
        raise SurgvqaError(f"the job did not start: {reason}")
    return {"run": run_id, "folder": str(folder), "warning": warning}


def _lock(folder: Path) -> None:
    """Waits for whoever launches a job in this folder, and keeps the others waiting until this process ends."""
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)


def _launched_before(workspace: str, command: str, token: str) -> Path | None:
    """The folder of the run that this launch started before its connection was lost. One that it began and did not
    start is discarded."""
    for folder in Path(workspace, "runs").glob(f"*-{command}-{token}"):
        with contextlib.suppress(FileNotFoundError):
            _lock(folder)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and not (folder / "supervisor.json").exists():
                if (folder / "start.json").exists():  # no supervisor has taken it, and none will
                    break
                time.sleep(0.02)
            with contextlib.suppress(OSError, ValueError):
                if json.loads((folder / "supervisor.json").read_text())["state"] == "running":
                    return folder
            _discard(folder)
    return None


def _bytecode_environment(python: str) -> dict[str, str]:
    """What keeps the job from compiling torch and transformers at every start, as its own Python sees it."""
    program = "import json; from surgvqa.runs import bytecode; print(json.dumps(bytecode.environment()))"
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        words = [python, *UTF8, "-c", program]
        found = json.loads(subprocess.check_output(words, stderr=subprocess.DEVNULL, timeout=30))
        return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
    return {}


def _discard(folder: Path) -> None:
    """Takes back the folder of a job that did not start: what was written into it, by exact name."""
    half = f".run.json.{os.getpid()}.tmp"
    for name in ("start.json", "run.json", half, "log.txt", "supervisor.json", "exit.json"):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _supervised(workspace: str, folder: Path, words: list[str]) -> dict[str, Any] | None:
    """Starts the supervisor by these words; what it says of itself, None when the program that starts it failed."""
    with open(folder / "log.txt", "ab") as log:
        starter = subprocess.Popen(
            words,
            cwd=workspace,
            env={"XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}", **os.environ},  # where systemd-run finds its manager
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        over = starter.poll()
        with contextlib.suppress(OSError, ValueError):
            return json.loads((folder / "supervisor.json").read_text())
        if over:
            return None
        time.sleep(0.02)
    return {"state": "failed", "error": "the supervisor did not answer in 30 s"}


def _last_line(file: Path) -> str:
    try:
        return (file.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    except OSError:
        return "no output"


def _gpu_locks(visible: str | None) -> list[str]:
    """One lock file a GPU that the job will see; on a machine without one, the machine itself is the device.

    Raises SurgvqaError when a process that holds no lock of ours computes on the GPU.
    """
    cards = nvidia_smi("--query-gpu=index,uuid")
    names = ["host"]
    if cards:
        wanted = [w.strip() for w in visible.split(",")] if visible else [index for index, _ in cards]
        chosen = [(index, uuid) for index, uuid in cards if index in wanted or uuid in wanted]
        names = ["gpu-" + index for index, _ in chosen] or ["gpu-all"]
        for pid, uuid, used in nvidia_smi("--query-compute-apps=pid,gpu_uuid,used_memory") or []:
            if uuid in [u for _, u in chosen] and not _ours(int(pid)):
                raise SurgvqaError(f"GPU busy: process {pid} takes {used} MiB; end it, wait, or launch with --share")
    folder = _lock_folder()
    return [os.path.join(folder, name + ".lock") for name in names]


def _lock_folder() -> str:
    """Where this user's locks of this machine lie: the same for every session, whatever its TMPDIR.

    The home may be shared by several machines, so the boot id is part of the path. Where the home cannot be written or
    has no locks (some network file systems), it is a folder of /tmp. Raises SurgvqaError when somebody else made that.
    """
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        home = os.path.join(os.path.expanduser("~"), ".cache", "surgvqa", "locks-" + boot)
        os.makedirs(home, mode=0o700, exist_ok=True)
        with open(os.path.join(home, "probe"), "ab") as probe, contextlib.suppress(BlockingIOError):
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return home
    folder = f"/tmp/surgvqa-{os.getuid()}"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.stat(folder).st_uid != os.getuid() or os.path.islink(folder):
        raise SurgvqaError(f"{folder} belongs to somebody else; remove it")
    return folder


def _ours(pid: int) -> bool:
    """Whether a process runs under one of our supervisors: then its lock speaks for it, with the run's name."""
    with contextlib.suppress(OSError):
        return b"SURGVQA_DETACHED=1" in Path(f"/proc/{pid}/environ").read_bytes()
    return False


def logout_kills() -> bool:
    """logind.conf(5): KillUserProcesses=yes ends even processes with sessions of their own."""
    answer = False
    for file in ["/etc/systemd/logind.conf", *sorted(glob.glob("/etc/systemd/logind.conf.d/*.conf"))]:
        with contextlib.suppress(OSError):
            for line in Path(file).read_text().splitlines():
                key, _, value = line.strip().partition("=")
                if key == "KillUserProcesses":
                    answer = value.strip().lower() in ("yes", "true", "1", "on")
    return answer


def lingers() -> bool:
    return os.path.exists("/var/lib/systemd/linger/" + pwd.getpwuid(os.getuid()).pw_name)
