"""What the host is: its Python, GPUs, disk and settings; and installing the program there."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from remote.agent.files import within
from surgvqa.errors import SurgvqaError
from surgvqa.files import write_json_atomic
from surgvqa.runs.process import machine_id


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
        "machine": machine_id(),
        "time": time.time(),
        "nvidia_smi": shutil.which("nvidia-smi") is not None,
    }


def _installed(workspace: str) -> str:
    return os.path.join(workspace, ".surgvqa", "installed.json")


def prepare(channel: Any, workspace: str, wheel_name: str, wheel: str, constraints: str) -> dict[str, Any]:
    """Makes the workspace and stores our wheel (base64) in it, and the versions that it is installed with."""
    folder = Path(workspace, ".surgvqa", "wheels")
    folder.mkdir(parents=True, exist_ok=True)
    versions = folder / "constraints.txt"
    versions.write_text(constraints, encoding="utf-8")
    file = Path(within(str(folder), wheel_name))
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(base64.b64decode(wheel))
    os.replace(temporary, file)
    return {"wheel": str(file), "constraints": str(versions)}


def installed(channel: Any, workspace: str, record: dict[str, Any]) -> dict[str, Any]:
    """Notes what `setup` installed."""
    write_json_atomic(Path(_installed(workspace)), record)
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
    assert process.stdout  # a pipe
    for line in process.stdout:
        channel.say({"line": line.decode(errors="replace").rstrip("\n")})
    code = process.wait()
    channel.children.remove(process.pid)
    return {"exit_code": code}


def nvidia_smi(*arguments: str) -> list[list[str]] | None:
    """nvidia-smi's CSV rows; None where it is missing or fails."""
    done = _run_smi(*arguments)
    if done is None or done.returncode:
        return None
    return [_cells(line) for line in done.stdout.splitlines() if line.strip()]


def _run_smi(*arguments: str) -> subprocess.CompletedProcess[str] | None:
    words = ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split(",")]


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


def smi_gpus() -> dict[str, Any]:
    """What nvidia-smi says of the GPUs, in `surgvqa gpus`'s keys. A card that it cannot read has a state and a problem
    (machine/gpu.py); when it names no card at all, the note says why."""
    done = _run_smi("--query-gpu=" + SMI_FIELDS)
    if done is None:
        there = shutil.which("nvidia-smi")
        why = "nvidia-smi does not answer in 20 s" if there else "no NVIDIA driver on this host (no nvidia-smi)"
        return {"gpus": [], "note": why}
    found: list[dict[str, Any]] = []
    for line in (done.stdout + done.stderr).splitlines():
        cells = _cells(line)
        if len(cells) == len(SMI_FIELDS.split(",")) and cells[0].isdigit():
            bad = next((cell.strip("[]") for cell in cells if "lost" in cell.lower() or "error" in cell.lower()), "")
            found.append({**parse_smi(cells), **_trouble(bad)})
        elif "lost" in line.lower() or "unable to determine the device handle" in line.lower():
            found.append({"index": "?", **_trouble(line.strip()[:200])})
    if done.returncode and not found:
        said = ((done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"])[0][:200]
        return {"gpus": [], "note": f"nvidia-smi fails: {said}"}
    return {"gpus": found, "source": "nvidia-smi"}


def _trouble(problem: str) -> dict[str, Any]:
    return {"state": "lost" if "lost" in problem.lower() else "failed", "problem": problem} if problem else {}


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
        answer = smi_gpus()
        if not watch:
            return answer
        channel.say(answer)
        time.sleep(watch)


def _stream(words: list[str], channel: Any) -> dict[str, Any]:
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout  # a pipe
    for line in process.stdout:
        channel.say(json.loads(line))
    raise SurgvqaError(f"surgvqa gpus ended with {process.wait()}")
