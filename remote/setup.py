"""`surgvqa-remote setup HOST`: installs workspace, virtual environment and our wheel on the host. Idempotent."""

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
from surgvqa.terminal.figures import human_seconds

PACKAGES = ("surgvqa", "remote", "tui", "presets")
MINIMUM = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
TRAIN_BYTES = 7e9  # of [train] on the disk, measured 6.3 GB: torch with its CUDA libraries
FULL_BYTES = 20e6
CLOCK_S = 10.0
"""Difference in seconds between two clocks from which `setup` warns."""
FLASH_ATTN_BUILD = "flash-attn has no ready build: building takes about 2.5 min on 16 cores, 20 min on 2"


@functools.cache
def code_digest() -> str:
    """A digest of our sources, which differs between two states with the same version number."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*")):
            if file.suffix in (".py", ".toml", ".tcss", ".html", ".css", ".js") and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def skew(installed: dict[str, Any] | None) -> str | None:
    """One line if the host's version of surgvqa differs from ours, otherwise None."""
    if installed is None:
        return "surgvqa is not installed there; run surgvqa-remote setup"
    if installed.get("code") != code_digest():
        theirs, ours = installed.get("version", "?"), __version__
        other = f"version {theirs}, here {ours}" if theirs != ours else f"another state of version {ours}"
        return f"the host has {other}; run surgvqa-remote setup"
    return None


def wrong_clock(theirs: object, before: float, after: float) -> str | None:
    """One line if the host's clock and ours differ by CLOCK_S or more, otherwise None.

    `theirs`: the host's Unix time, requested between `before` and `after`.
    """
    if not isinstance(theirs, (int, float)):
        return None
    off = theirs - after if theirs > after else min(0.0, theirs - before)
    if abs(off) < CLOCK_S:
        return None
    return (
        f"its clock is {human_seconds(abs(off))} {'ahead of' if off > 0 else 'behind'} this one, and the times of its "
        "runs look wrong here; on the one that is wrong: sudo timedatectl set-ntp true"
    )


def build_wheel(folder: Path) -> Path:
    """Our own wheel, built from the checkout or assembled from the installed files."""
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


def constraints(with_torch: bool) -> str:
    """The versions that we are tested with, as `make` installs them.

    `with_torch`: includes torch's version; without it, the host's own torch stays.
    """
    file = ROOT / "constraints.txt"
    lines = (file if file.is_file() else ROOT / "surgvqa/constraints.txt").read_text(encoding="utf-8").splitlines(True)
    return "".join(line for line in lines if with_torch or not line.startswith("torch=="))


def _wheel_from_installation(folder: Path) -> None:
    """Writes a wheel, a zip of the files that its RECORD lists. pip keeps all of them in site-packages."""
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
    """Installs everything that a job needs on the host. A second call changes nothing and takes a second."""
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
            versions = constraints(with_torch=not (system_site_packages or facts["has_venv"]))
            stored = remote.call("prepare", wheel_name=wheel.name, wheel=content, constraints=versions)
            path = stored["wheel"]
        run.phase("venv", facts["venv"])
        # An existing one is kept: made again, it would lose --system-site-packages, and with it the host's torch.
        if system_site_packages or not facts["has_venv"] or not _has_pip(remote, python):
            options = ["--system-site-packages"] if system_site_packages else []
            execute(remote, [facts["python"], "-m", "venv", *options, facts["venv"]], "making the virtual environment")
        run.phase("install", f"surgvqa[{extra}] and what it needs" if extra else "surgvqa")
        words = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
        words += ["--constraint", stored["constraints"]]
        target = f"surgvqa[{extra}] @ {PurePosixPath(path).as_uri()}" if extra else path
        execute(remote, [*words, target], "pip install", run)
        # the same version number may be another state of the code
        execute(remote, [*words, "--force-reinstall", "--no-deps", path], "pip install", run)
        if flash_attn:
            run.phase("flash-attn", FLASH_ATTN_BUILD)
            execute(remote, [*words, "--no-build-isolation", "flash-attn>=2.8"], "installing flash-attn", run)
        made = not facts["has_venv"] or installed.get("made_venv") is True  # otherwise somebody else made it
        record = {"version": __version__, "code": code_digest(), "at": time.time(), "made_venv": made, **asked}
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
    """Whether the environment was made completely."""
    return remote.call("execute", argv=[python, "-m", "pip", "--version"]).get("exit_code") == 0


def execute(remote: Remote, argv: list[str], what: str, run: Reporter | None = None) -> list[str]:
    """Runs a program on the host and returns its lines of output.

    Raises SurgvqaError with its last line if it fails. If the connection is lost, the host ends the program, and it is
    run again.
    """
    lines: list[str] = []

    def attempt() -> int:
        lines.clear()
        code = -1
        for message in remote.stream("execute", argv=argv):
            if "line" in message:
                lines.append(message["line"])
                if run is not None and message["line"].strip():
                    run.emit("output", text=message["line"])
            else:
                code = message.get("exit_code", code)
        return code

    if remote.patiently(attempt):
        last = ([line for line in lines if line.startswith("ERROR")] or lines or ["no output"])[-1]
        facts = remote.call("probe", venv=remote.host.entry.venv)  # programs report a full disk in many different ways
        if facts["free"] < FULL_BYTES or "No space left" in " ".join(lines):
            last = f"disk full, {facts['free'] / 1e6:.0f} MB free in {facts['workspace']}; free some space there"
        elif "ensurepip is not available" in " ".join(lines):
            last += " (Debian and Ubuntu: apt-get install python3-venv)"
        raise SurgvqaError(f"{remote.host.name}: {what} failed: {last}")
    return lines


def ask_json(remote: Remote, argv: list[str]) -> Any:
    """The JSON document that a program on the host prints, or None if it prints none."""
    messages = remote.patiently(lambda: list(remote.stream("execute", argv=argv)))
    lines = [m["line"] for m in messages if "line" in m]
    try:
        return json.loads("\n".join(lines))
    except ValueError:
        return None
