"""Jobs on the host: what this machine is, launching, listing, following and stopping runs, GPUs."""

from __future__ import annotations

import base64
import contextlib
import glob
import json
import os
import platform
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from remote.agent.files import read_record, within
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs import folder as run_folders
from surgvqa.runs.supervisor import close_events, descendants, end_all, process_identity, signal_exactly, write_json

POLL_S = 0.2
STATE_EVERY_S = 1.0
EXIT_PATIENCE_S = 10.0
READ_AT_ONCE = 1 << 18
UTF8 = ("-X", "utf8")  # names are what they were where they came from, whatever the locale here
FOLLOWED = ("events.jsonl", "log.txt")
SYSTEMD_RUN = [
    *("systemd-run", "--user", "--quiet", "--collect", "--same-dir"),
    # The supervisor ends its job itself, and notes a job that was killed for memory: nothing is to end it for that.
    *("--property=KillMode=mixed", "--property=OOMPolicy=continue"),
]


def probe(channel: Any, workspace: str, venv: str) -> dict[str, Any]:
    """What this machine is and what is installed in the workspace."""
    below = workspace
    while not os.path.exists(below):
        below = os.path.dirname(below)
    with contextlib.suppress(OSError, ValueError), open(_installed(workspace), encoding="utf-8") as file:
        installed = json.load(file)
        return {**_machine(workspace, below, venv), "installed": installed}
    return {**_machine(workspace, below, venv), "installed": None}


def _machine(workspace: str, existing: str, venv: str) -> dict[str, Any]:
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpu = ""
    return {
        "workspace": workspace,
        "venv": os.path.join(workspace, os.path.expanduser(venv)),
        "has_venv": os.path.exists(os.path.join(workspace, os.path.expanduser(venv), "bin", "python")),
        "writable": os.access(existing, os.W_OK),
        "free": shutil.disk_usage(existing).free,
        "python": sys.executable,
        "python_version": platform.python_version(),
        "cpus": os.cpu_count(),
        "aes": " aes" in cpu or platform.machine() in ("arm64", "aarch64"),
        "node": platform.node(),
        "time": time.time(),
        "nvidia_smi": shutil.which("nvidia-smi") is not None,
    }


def _installed(workspace: str) -> str:
    return os.path.join(workspace, ".surgvqa", "installed.json")


def prepare(channel: Any, workspace: str, wheel_name: str, wheel: str) -> dict[str, Any]:
    """Makes the workspace and stores our wheel (base64) in it."""
    folder = Path(workspace, ".surgvqa", "wheels")
    folder.mkdir(parents=True, exist_ok=True)
    file = Path(within(str(folder), wheel_name))
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(base64.b64decode(wheel))
    os.replace(temporary, file)
    return {"wheel": str(file)}


def installed(channel: Any, workspace: str, record: dict[str, Any]) -> dict[str, Any]:
    """Notes what `setup` installed."""
    write_json(Path(_installed(workspace)), record)
    return {}


def settings(channel: Any, workspace: str, text: str) -> dict[str, Any]:
    """Writes surgvqa.toml, unless somebody else's is there."""
    file = Path(workspace, "surgvqa.toml")
    first = text.split("\n", 1)[0]
    if file.exists() and not file.read_text(errors="replace").startswith(first):
        return {"kept": True}
    temporary = file.with_name(".surgvqa.toml.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
    return {"kept": False}


def execute(channel: Any, workspace: str, argv: list[str], env: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a program in the workspace without a shell; says its output line by line. It ends when we are left."""
    try:
        process = subprocess.Popen(
            argv,
            cwd=workspace if os.path.isdir(workspace) else None,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise SurgvqaError(f"{argv[0]}: {error.strerror}") from None
    channel.children.append(process.pid)
    for line in process.stdout:
        channel.say({"line": line.decode(errors="replace").rstrip("\n")})
    code = process.wait()
    channel.children.remove(process.pid)
    return {"exit_code": code}


# --- launching -------------------------------------------------------------------------------------------------------


def launch(
    channel: Any,
    workspace: str,
    venv: str,
    command: str,
    argv: list[str],
    needs: list[str],
    env: dict[str, str],
    secrets: dict[str, str],
    exclusive: bool,
) -> dict[str, Any]:
    """Starts `surgvqa COMMAND ARGV…` under a supervisor, detached from this connection. Returns the run's id.

    `needs` must exist in the workspace and be published whole. `exclusive`: refuse while another job has the GPU.
    """
    python = os.path.join(workspace, os.path.expanduser(venv), "bin", "python")
    if not os.path.exists(python):
        raise SurgvqaError(f"no {python}; run surgvqa-remote setup first")
    for path in needs:
        if not os.path.lexists(within(workspace, path)):
            raise UsageError(f"{path} is not in {workspace}; run surgvqa-remote upload first")
        if read_record(workspace, path).get("state") == "publishing":
            raise SurgvqaError(f"the upload of {path} did not come to its end; run surgvqa-remote upload again")
    locks = _gpu_locks(env.get("CUDA_VISIBLE_DEVICES")) if exclusive else []
    run_id = run_folders.new_run_id(command)
    folder = Path(workspace, "runs", run_id)
    folder.mkdir(parents=True)
    full = [command, *argv, "--workspace", workspace]
    info = {
        "v": 1,
        "id": run_id,
        "command": command,
        "argv": [command, *argv],
        "cwd": workspace,
        "host": platform.node(),
        "pid": None,
        "started": time.time(),
    }
    start = {
        "argv": [python, *UTF8, "-m", "surgvqa", *full, "--run_id", run_id],
        "cwd": workspace,
        "env": {**os.environ, **env, **secrets, "SURGVQA_DETACHED": "1", "PYTHONUNBUFFERED": "1"},
        "locks": locks,
    }
    try:
        run_folders.write_json_atomic(folder / "run.json", info)
        descriptor = os.open(folder / "start.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(start, file)
    except OSError:
        _discard(folder)
        raise
    words = [python, *UTF8, "-m", "surgvqa.runs.supervisor", str(folder)]
    said, warning = None, ""
    if _lingers() and shutil.which("systemd-run"):
        # A lingering user manager outlives every logout, whatever logind.conf says.
        escaped = [w.replace("$", "$$") for w in words]
        said = _supervised(workspace, folder, [*SYSTEMD_RUN, "--unit=surgvqa-" + run_id, "--", *escaped])
    if said is None:
        said = _supervised(workspace, folder, words) or {"state": "failed"}
        if _logout_kills():
            warning = "this host ends your processes at logout (KillUserProcesses): run loginctl enable-linger there"
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


def _smi(*arguments: str) -> list[list[str]] | None:
    """nvidia-smi's CSV rows; None where there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def _gpu_locks(visible: str | None) -> list[str]:
    """One lock file a GPU that the job will see; on a machine without one, the machine itself is the device.

    Raises SurgvqaError when a process that holds no lock of ours computes on the GPU.
    """
    cards = _smi("--query-gpu=index,uuid")
    names = ["host"]
    if cards:
        wanted = [w.strip() for w in visible.split(",")] if visible else [index for index, _ in cards]
        chosen = [(index, uuid) for index, uuid in cards if index in wanted or uuid in wanted]
        names = ["gpu-" + index for index, _ in chosen] or ["gpu-all"]
        for pid, uuid, used in _smi("--query-compute-apps=pid,gpu_uuid,used_memory") or []:
            if uuid in [u for _, u in chosen] and not _ours(int(pid)):
                raise SurgvqaError(f"GPU busy: process {pid} takes {used} MiB; end it, wait, or launch with --share")
    folder = os.path.join(tempfile.gettempdir(), f"surgvqa-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.stat(folder).st_uid != os.getuid() or os.path.islink(folder):
        raise SurgvqaError(f"{folder} belongs to somebody else; remove it")
    return [os.path.join(folder, name + ".lock") for name in names]


def _ours(pid: int) -> bool:
    """Whether a process runs under one of our supervisors: then its lock speaks for it, with the run's name."""
    with contextlib.suppress(OSError):
        return b"SURGVQA_DETACHED=1" in Path(f"/proc/{pid}/environ").read_bytes()
    return False


def _logout_kills() -> bool:
    """logind.conf(5): KillUserProcesses=yes ends even processes with sessions of their own."""
    answer = False
    for file in ["/etc/systemd/logind.conf", *sorted(glob.glob("/etc/systemd/logind.conf.d/*.conf"))]:
        with contextlib.suppress(OSError):
            for line in Path(file).read_text().splitlines():
                key, _, value = line.strip().partition("=")
                if key == "KillUserProcesses":
                    answer = value.strip().lower() in ("yes", "true", "1", "on")
    return answer


def _lingers() -> bool:
    return os.path.exists("/var/lib/systemd/linger/" + pwd.getpwuid(os.getuid()).pw_name)


# --- runs ------------------------------------------------------------------------------------------------------------


def _find(workspace: str, run: str, command: str | None = None) -> Path:
    if "/" in run or "\0" in run:
        raise UsageError(f"run {run!r}: expected an id, the beginning of one, a run name, or last")
    return run_folders.find_run(run, [Path(workspace, "runs")], command)


def _exit_of(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "exit.json").read_text())
    return {}


def _supervisor_of(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "supervisor.json").read_text())
    return {}


def _folders_of(workspace: str, folder: Path, info: dict[str, Any]) -> list[str]:
    """What belongs to a run, relative to the workspace: its folder, and its output_dir where that lies elsewhere in
    the workspace (a resumed run writes into the folder of the run that it goes on with)."""
    found = ["runs/" + folder.name]
    output = ((info.get("options") or {}).get("output_dir") or {}).get("value")
    if output:
        path = Path(os.path.realpath(os.path.join(info.get("cwd") or workspace, output)))
        inside = path.is_dir() and Path(workspace) in path.parents and folder not in (path, *path.parents)
        found += [path.relative_to(workspace).as_posix()] if inside else []
    return found


def runs(channel: Any, workspace: str, run: str | None = None, command: str | None = None) -> dict[str, Any]:
    """Every run of the workspace, newest first, whoever started it; or one of them with its run.json.

    `run` "last" is the newest of `command`, where one is given.
    """
    if run is not None:
        folder = _find(workspace, run, command)
        info = run_folders.read_run_json(folder)
        return {
            "id": folder.name,
            "state": run_folders.state_of(folder),
            "run": info,
            "exit": _exit_of(folder),
            "folders": _folders_of(workspace, folder, info),
        }
    listed = run_folders.list_runs(Path(workspace, "runs"))
    return {
        "runs": [{**r.data(), "exit": _exit_of(r.folder)} for r in listed],
        "time": time.time(),
    }


def follow(channel: Any, workspace: str, run: str, offsets: dict[str, int]) -> dict[str, Any]:
    """Says what is new in the run's events and log, from these byte offsets on, until the run has ended.

    {"run": id, "state"}, {"file", "at", "text"} (bytes as UTF-8 with surrogate escapes), {"file", "restart": true}
    when a file was replaced or became shorter.
    """
    folder = _find(workspace, run)
    at = {name: int(offsets.get(name, 0)) for name in FOLLOWED}
    inodes: dict[str, int] = {}
    state, checked, last_said, settled = "", 0.0, None, False
    while True:
        if time.monotonic() - checked > STATE_EVERY_S:
            state, checked = run_folders.state_of(folder), time.monotonic()
            if state != last_said:
                channel.say({"run": folder.name, "state": state})
                last_said = state
        ended = state not in ("starting", "running")
        news = False
        for name in FOLLOWED:
            with contextlib.suppress(FileNotFoundError), open(folder / name, "rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_size < at[name] or inodes.get(name, stat.st_ino) != stat.st_ino:
                    at[name] = 0
                    channel.say({"file": name, "restart": True})
                inodes[name] = stat.st_ino
                file.seek(at[name])
                data = file.read(READ_AT_ONCE)
                if data:
                    news = True
                    channel.say({"file": name, "at": at[name], "text": data.decode("utf-8", "surrogateescape")})
                    at[name] += len(data)
        if ended and not news:
            if not settled:  # its supervisor sweeps up, says of a killed job by what, and notes how it ended
                supervisor = _supervisor_of(folder)
                _wait_gone(supervisor.get("pid"), supervisor.get("identity"), EXIT_PATIENCE_S)
                settled, state = True, run_folders.state_of(folder)
                continue
            finished = run_folders.finished_event(folder) or {}
            return {"run": folder.name, "state": state, "finished": finished, "exit": _exit_of(folder)}
        if not news:
            time.sleep(POLL_S)


def stop(channel: Any, workspace: str, run: str, grace_s: float) -> dict[str, Any]:
    """SIGTERM to the job, time for a checkpoint, then SIGKILL to all that is left of it; nobody else's process.

    The supervisor does it where there is one; a job started by hand is ended from here.
    """
    folder = _find(workspace, run)
    before, began = run_folders.state_of(folder), time.monotonic()
    supervisor = _supervisor_of(folder)
    if before in ("running", "starting"):
        write_json(folder / "stop.json", {"grace_s": grace_s})
    pid, identity = supervisor.get("pid"), supervisor.get("identity")
    if pid and signal_exactly(pid, identity, 15):
        _wait_gone(pid, identity, grace_s + 15)
        if process_identity(pid) == identity:  # wedged itself: end all that hangs below it
            end_all([*descendants(pid), pid], 0.0)
    info = run_folders.read_run_json(folder)
    pid, identity = info.get("pid"), info.get("identity")
    if pid and identity and process_identity(pid) == identity:
        family = descendants(pid)
        known = {p: process_identity(p) for p in family}
        signal_exactly(pid, identity, 15)
        _wait_gone(pid, identity, grace_s)
        if process_identity(pid) == identity:
            end_all([*descendants(pid), pid], 0.0)
        end_all([p for p in family if known[p] and process_identity(p) == known[p]], 2.0)
    if before == "running" and run_folders.state_of(folder) == "died":
        close_events(folder, None, None, stopped=True)
    return {
        "run": folder.name,
        "state": run_folders.state_of(folder),
        "before": before,
        "seconds": time.monotonic() - began,
        "exit": _exit_of(folder),
    }


def _wait_gone(pid: int | None, identity: str | None, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while pid and identity and process_identity(pid) == identity and time.monotonic() < deadline:
        time.sleep(0.05)


# --- GPUs ------------------------------------------------------------------------------------------------------------

SMI_FIELDS = "index,name,uuid,memory.used,memory.total,utilization.gpu,power.draw,temperature.gpu"


def parse_smi(row: list[str]) -> dict[str, Any]:
    """One nvidia-smi row in `surgvqa gpus`'s keys; what it cannot tell ("[N/A]") is absent."""

    def number(text: str, scale: float = 1) -> float | None:
        try:
            return float(text) * scale
        except ValueError:
            return None

    index, name, uuid, used, total, busy, power, celsius = row
    figures = {
        "index": int(index),
        "name": name,
        "uuid": uuid,
        "memory_used_bytes": number(used, 1 << 20),
        "memory_total_bytes": number(total, 1 << 20),
        "utilization_percent": number(busy),
        "power_w": number(power),
        "temperature_c": number(celsius),
    }
    return {key: value for key, value in figures.items() if value is not None}


def gpus(channel: Any, workspace: str, venv: str, watch: float | None) -> dict[str, Any]:
    """NVML through our package in the venv; where that is missing, nvidia-smi. With `watch`, a message a sample."""
    python = os.path.join(workspace, os.path.expanduser(venv), "bin", "python")
    words = [python, "-m", "surgvqa", "gpus", "--json"]
    if os.path.exists(python):
        done = subprocess.run(words, capture_output=True, text=True)
        with contextlib.suppress(ValueError):
            answer = json.loads(done.stdout)
            if answer["gpus"] or not shutil.which("nvidia-smi"):
                return _stream([*words, "--watch", str(watch)], channel) if watch else answer
    while True:
        rows = _smi("--query-gpu=" + SMI_FIELDS)
        answer = {"gpus": [parse_smi(row) for row in rows or []], "source": "nvidia-smi"}
        if rows is None:
            answer = {"gpus": [], "note": "no NVIDIA driver on this host (no nvidia-smi)"}
        if not watch:
            return answer
        channel.say(answer)
        time.sleep(watch)


def _stream(words: list[str], channel: Any) -> dict[str, Any]:
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    for line in process.stdout:
        channel.say(json.loads(line))
    raise SurgvqaError(f"surgvqa gpus ended with {process.wait()}")
