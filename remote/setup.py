"""`surgvqa-remote setup HOST`: workspace, virtual environment and our own wheel on the host; idempotent."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from remote.ssh.connection import Remote
from surgvqa import __version__
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs.reporter import Reporter

PACKAGES = ("surgvqa", "remote", "tui", "presets")
MINIMUM = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
TRAIN_BYTES = 7e9  # of [train] on the disk, measured 6.3 GB: torch with its CUDA libraries
FULL_BYTES = 20e6
FLASH_ATTN_BUILD = "flash-attn has no ready build: building takes about 2.5 min on 16 cores, 20 min on 2"


@functools.cache
def code_digest() -> str:
    """Tells two states of our sources apart, also when the version number is the same."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*")):
            if file.suffix in (".py", ".toml", ".tcss", ".html", ".css", ".js") and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def skew(installed: dict[str, Any] | None) -> str | None:
    """One line when the host has another version of us than this side, None when they are the same."""
    if installed is None:
        return "surgvqa is not installed there; run surgvqa-remote setup"
    if installed.get("code") != code_digest():
        theirs, ours = installed.get("version", "?"), __version__
        other = f"version {theirs}, here {ours}" if theirs != ours else f"another state of version {ours}"
        return f"the host has {other}; run surgvqa-remote setup"
    return None


def build_wheel(folder: Path) -> Path:
    """Our own wheel: built from the checkout, or put together again from what is installed."""
    if (ROOT / "pyproject.toml").is_file():
        words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
        if importlib.util.find_spec("hatchling"):
            words.insert(4, "--no-build-isolation")
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise SurgvqaError(f"building our wheel failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    else:
        _wheel_from_installation(folder)
    return next(folder.glob("surgvqa-*.whl"))


def _wheel_from_installation(folder: Path) -> None:
    """A wheel is a zip of the files that its RECORD lists; pip left all of them in site-packages."""
    distribution = importlib.metadata.distribution("surgvqa")
    name = f"surgvqa-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in distribution.files or []:
            if (
                ".." not in file.parts
                and "__pycache__" not in file.parts
                and file.name not in ("INSTALLER", "REQUESTED")
            ):
                archive.write(file.locate(), str(file))


def setup(
    remote: Remote,
    run: Reporter,
    *,
    extra: str = "train",
    system_site_packages: bool = False,
    flash_attn: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Everything that a job needs there. Doing it again changes nothing and takes a second."""
    began = time.monotonic()
    entry, name = remote.host.entry, remote.host.name
    facts = remote.call("probe", venv=entry.venv)
    if not facts["writable"]:
        raise SurgvqaError(f"{name}: cannot write in {facts['workspace']}; set workspace in hosts.toml")
    version = tuple(int(p) for p in facts["python_version"].split(".")[:2])
    if version < MINIMUM:
        raise UsageError(
            f"{name}: {entry.python} is Python {facts['python_version']}, 3.11 or newer is needed; "
            'install one and name it in hosts.toml: python = "python3.11"'
        )
    python = f"{facts['venv']}/bin/python"
    asked = {"extra": extra, "flash_attn": flash_attn}
    installed = facts["installed"] or {}
    fresh = skew(facts["installed"]) is None and all(installed.get(k) == v for k, v in asked.items())
    if extra and not installed and facts["free"] < TRAIN_BYTES:
        run.warning(
            f"{facts['free'] / 1e9:.1f} GB free on {name}; the packages of [train] take {TRAIN_BYTES / 1e9:.0f} GB"
        )
    if not fresh or force:
        run.phase("wheel", "building our own wheel")
        with tempfile.TemporaryDirectory() as folder:
            wheel = build_wheel(Path(folder))
            content = base64.b64encode(wheel.read_bytes()).decode()
            path = remote.call("prepare", wheel_name=wheel.name, wheel=content)["wheel"]
        run.phase("venv", facts["venv"])
        # One that stands keeps its settings: made again, it would lose --system-site-packages, and the host's torch.
        if system_site_packages or not facts["has_venv"] or not _has_pip(remote, python):
            options = ["--system-site-packages"] if system_site_packages else []
            execute(remote, [facts["python"], "-m", "venv", *options, facts["venv"]], "making the virtual environment")
        run.phase("install", f"surgvqa[{extra}] and what it needs" if extra else "surgvqa")
        words = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
        target = f"surgvqa[{extra}] @ {PurePosixPath(path).as_uri()}" if extra else path
        execute(remote, [*words, target], "pip install", run)
        # the same version number may be another state of the code
        execute(remote, [*words, "--force-reinstall", "--no-deps", path], "pip install", run)
        if flash_attn:
            run.phase("flash-attn", FLASH_ATTN_BUILD)
            execute(remote, [*words, "--no-build-isolation", "flash-attn>=2.8"], "installing flash-attn", run)
        record = {"version": __version__, "code": code_digest(), "at": time.time(), **asked}
        remote.call("installed", record=record)
    run.phase("doctor", f"on {name}")
    doctor = ask_json(remote, [python, "-m", "surgvqa", "doctor", "--json"])
    for finding in doctor["findings"] if doctor else []:
        if finding["status"] in ("warn", "bad"):
            run.warning("; ".join(part for part in (finding["text"], finding["mend"]) if part))
    if doctor is None:
        run.warning(f"surgvqa doctor says nothing on {name}; run setup with --force")
    return {
        "host": name,
        "workspace": facts["workspace"],
        "venv": facts["venv"],
        "version": __version__,
        "changed": not fresh or force,
        "doctor": doctor,
        "seconds": time.monotonic() - began,
    }


def _has_pip(remote: Remote, python: str) -> bool:
    """Whether the environment was made to its end."""
    return list(remote.stream("execute", argv=[python, "-m", "pip", "--version"]))[-1].get("exit_code") == 0


def execute(remote: Remote, argv: list[str], what: str, run: Reporter | None = None) -> list[str]:
    """Runs a program there; raises with its last line when it fails."""
    lines: list[str] = []
    code = -1
    for message in remote.stream("execute", argv=argv):
        if "line" in message:
            lines.append(message["line"])
            if run is not None and message["line"].strip():
                run.emit("output", text=message["line"])
        else:
            code = message["exit_code"]
    if code:
        last = ([line for line in lines if line.startswith("ERROR")] or lines or ["no output"])[-1]
        facts = remote.call("probe", venv=remote.host.entry.venv)  # programs on a full disk say all sorts of things
        if facts["free"] < FULL_BYTES or "No space left" in " ".join(lines):
            last = f"disk full, {facts['free'] / 1e6:.0f} MB free in {facts['workspace']}; free some space there"
        elif "ensurepip is not available" in " ".join(lines):
            last += " (Debian and Ubuntu: apt-get install python3-venv)"
        raise SurgvqaError(f"{remote.host.name}: {what} failed: {last}")
    return lines


def ask_json(remote: Remote, argv: list[str]) -> Any:
    """The JSON document that a program there prints; None when it prints none."""
    lines = [m["line"] for m in remote.stream("execute", argv=argv) if "line" in m]
    try:
        return json.loads("\n".join(lines))
    except ValueError:
        return None
