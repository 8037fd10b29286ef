"""`surgvqa doctor`: shows what this machine can do, one line per finding, and how to repair what is broken.

A child process imports torch and the libraries that use it. So a broken build that crashes on import becomes a finding
and does not crash the doctor, which itself imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from packaging.requirements import Requirement

from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError
from surgvqa.machine import all_reduce, gpu, gpus
from surgvqa.machine.finding import Finding
from surgvqa.machine.surroundings import surroundings
from surgvqa.machine.wandb_key import wandb_key_source
from surgvqa.outcome import Outcome

TRAIN_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "librosa",
    "soundfile",
)
TRAIN_EXTRA = "pip install 'surgvqa[train]'"
PROBE_TIMEOUT_S = 180
NO_ANSWER = "no answer"
PROBE = """
import importlib, importlib.util, json
from surgvqa.errors import first_line, unimportable
def look(name, function):
    print("\\n" + json.dumps({name: None}), flush=True)
    try:
        found = function()
    except BaseException as error:
        found = {"error": f"{type(error).__name__}: {first_line(error)[:300]}", "culprit": unimportable(error)}
    print("\\n" + json.dumps({name: found}), flush=True)
def torch_facts():
    import torch
    facts = {"version": torch.__version__, "built_for": torch.version.cuda, "cuda": torch.cuda.is_available()}
    if facts["cuda"]:
        facts["gpus"] = [{"name": p.name, "capability": [p.major, p.minor], "memory": p.total_memory}
                         for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))]
        facts["architectures"] = torch.cuda.get_arch_list()
        torch.ones(8, device="cuda").sum().item()
        facts["bf16"] = torch.cuda.is_bf16_supported()
    return facts
def attention():
    from surgvqa.model.attention import REAL_SHAPE, choose_attention
    import torch
    name, why = choose_attention("auto", "cuda" if torch.cuda.is_available() else "cpu", REAL_SHAPE)
    return {"name": name, "why": why}
def bitsandbytes():
    import torch, bitsandbytes
    if torch.cuda.is_available():
        p = torch.nn.Parameter(torch.zeros(8192, device="cuda"))
        p.grad = torch.ones_like(p)
        bitsandbytes.optim.AdamW8bit([p], lr=1e-3).step()
    return {"version": bitsandbytes.__version__}
def optional(name):
    found = importlib.util.find_spec(name)
    return {"version": importlib.import_module(name).__version__ if found else None}
def sound():
    import soundfile, soxr  # not librosa, which only m4a needs: on a new machine its import compiles for 12 s
    return {"version": soundfile.__version__}
look("torch", torch_facts)
look("bitsandbytes", bitsandbytes)
for name in ("transformers", "peft"):
    look(name, lambda: {"version": importlib.import_module(name).__version__})
look("soundfile", sound)
for name in ("flash_attn", "wandb"):
    look(name, lambda: optional(name))
look("attention", attention)
"""
PROBED = ("torch", "bitsandbytes", "transformers", "peft", "soundfile", "flash_attn", "wandb", "attention")


def run(arguments: Namespace, workspace: Workspace) -> Outcome:
    """Exit code 1 if something that training needs is broken. A machine without torch is not broken."""
    findings = list(examine(workspace))
    ok = not any(f.status == "bad" for f in findings)
    return Outcome({"ok": ok, "findings": [asdict(f) for f in findings]}, ok, lambda console: _show(console, findings))


def examine(workspace: Workspace) -> Iterator[Finding]:
    """Yields all findings in display order."""
    yield _python()
    yield from _gpus()
    installed = {name: version(name) for name in TRAIN_PACKAGES}
    missing = [name for name, found in installed.items() if found is None]
    if installed["torch"] is None:
        yield Finding(
            "train",
            "info",
            f"torch is not installed: this machine can use a remote host and run the panel; to train: {TRAIN_EXTRA}",
        )
    else:
        if missing:
            yield Finding("train", "bad", f"not installed: {', '.join(missing)}", TRAIN_EXTRA)
        old = list(_versions(installed))
        yield from old
        faulty = {finding.name for finding in old}
        found = probe()
        yield from (f for f in _library_findings(found) if f.status == "bad" or f.name not in faulty)
        gpus = (found.get("torch") or {}).get("gpus", [])
        if len(gpus) > 1:
            yield all_reduce.check_all_reduce(len(gpus))
    yield from _sound()
    yield from surroundings(workspace.root)
    yield _wandb()


# --- what needs no torch ---------------------------------------------------------------------------------------------


def _python() -> Finding:
    return Finding("python", "ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")


def _driver_problem() -> str | None:
    try:
        return gpus.answered(gpu.driver_problem)
    except SurgvqaError as error:
        return str(error)


def _gpus() -> Iterator[Finding]:
    try:
        problem, devices = gpus.answered(lambda: (gpu.driver_problem(), gpu.sample_devices()))
    except SurgvqaError as error:
        problem, devices = str(error), []
    if problem:
        broken = "does not answer" in problem
        yield Finding(
            "gpu",
            "bad" if broken else "info",
            problem,
            "reboot, or reinstall the driver: nvidia-smi must work" if broken else "",
        )
    for device in devices:
        name = f"gpu {device['index']}" + (f".{device['mig_index']}" if "mig_index" in device else "")
        if device.get("state", "ok") != "ok":
            mend = "restart this machine (dmesg | grep Xid shows why); if it happens again, change the card or the host"
            yield Finding(name, "bad", gpu.trouble(device), mend)
            continue
        total = device.get("memory_total_bytes")
        used = device.get("memory_used_bytes", 0)
        text = device.get("name", "?") + (f", {total / 1e9:.0f} GB" if total else "")
        if "mig_index" in device:
            text += f"; a MIG instance: a job sees one, chosen by CUDA_VISIBLE_DEVICES={device.get('uuid', '?')}"
        others = [p for p in device.get("processes", []) if p["pid"] != os.getpid()]
        if total and used > 0.05 * total:
            whose = ", ".join(f"{p.get('name', 'another container')} (pid {p['pid']})" for p in others[:3])
            text += f"; {used / 1e9:.1f} GB taken" + (f" by {whose}" if whose else "")
            yield Finding(name, "warn", text, "end processes that do not have to run there")
        else:
            yield Finding(name, "ok", text)


def version(package: str) -> str | None:
    """The installed version of a package, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """`2.11.0+cu130` -> (2, 11, 0)."""
    return tuple(int(n) for n in re.findall(r"\d+", text.partition("+")[0])[:3])


def lower_bounds() -> dict[str, str]:
    """{package: oldest allowed version} from our own metadata (pyproject.toml)."""
    try:
        wanted = importlib.metadata.requires("surgvqa") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    needs = [Requirement(line) for line in wanted]
    return {need.name.lower(): bound.version for need in needs for bound in need.specifier if bound.operator == ">="}


def _versions(installed: dict[str, str | None]) -> Iterator[Finding]:
    for package, least in lower_bounds().items():
        found = installed.get(package)
        if found and release(found) < release(least):
            text = f"{package} {found}: older than {least}, the oldest version that surgvqa is tested with"
            yield Finding(package, "bad", text, f"pip install -U '{package}>={least}'")
    vision = version("torchvision")
    if vision and installed["torch"]:
        expected = (0, release(installed["torch"])[1] + 15)  # torchvision 0.26 belongs to torch 2.11
        if release(vision)[:2] != expected:
            yield Finding(
                "torchvision",
                "warn",
                f"torchvision {vision} does not belong to torch {installed['torch']}; transformers imports it",
                f"pip install 'torchvision=={expected[0]}.{expected[1]}.*', or pip uninstall torchvision",
            )


def _sound() -> Iterator[Finding]:
    library = version("soundfile") or ctypes.util.find_library("sndfile")
    if library:
        yield Finding("sound files", "ok", "wav, flac and mp3 through libsndfile")
    elif shutil.which("ffmpeg"):
        yield Finding(
            "sound files", "warn", "no libsndfile; ffmpeg decodes mp3, which is slow", "pip install soundfile"
        )
    elif version("torch"):
        yield Finding(
            "sound files", "bad", "neither libsndfile nor ffmpeg: no recording can be read", "pip install soundfile"
        )


def _wandb() -> Finding:
    """Says where the API key is, if there is one. The key itself is never shown."""
    if source := wandb_key_source():
        return Finding("W&B", "ok", f"a key is in {source}")
    return Finding("W&B", "info", "no key: --report_to wandb would run offline (wandb login sets one)")


# --- what torch says -------------------------------------------------------------------------------------------------


def probe() -> dict[str, Any]:
    """{library: facts} about torch and the libraries that use it, from a child process.

    If the child crashed, also {"crash": how it ended, "in": the library that it was importing}.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_TIMEOUT_S,
            env={**os.environ, "TRANSFORMERS_OFFLINE": "1"},
        )
        out, how = done.stdout, ""
    except subprocess.TimeoutExpired as error:
        out, how = (error.stdout or b"").decode(errors="replace"), f"{NO_ANSWER} in {PROBE_TIMEOUT_S} s"
    found: dict[str, Any] = {}
    for line in out.splitlines():
        with contextlib.suppress(ValueError, TypeError):  # lines that the libraries print
            found |= {name: facts for name, facts in json.loads(line).items() if name in PROBED}
    unfinished = [name for name in PROBED if found.get(name) is None]
    if not unfinished:
        return found
    if not how:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        how = f"exit code {done.returncode}: {last[:200]}"
    return {"crash": how, "in": unfinished[0]}


def _library_findings(found: dict[str, Any]) -> Iterator[Finding]:
    if "crash" in found:
        name = found.get("in", "torch")
        does = "does not come to an end" if found["crash"].startswith(NO_ANSWER) else "ends the process"
        yield Finding(name, "bad", f"importing it {does} ({found['crash']})", _reinstall(name))
        return
    torch = found["torch"]
    if "error" in torch:
        yield Finding("torch", "bad", torch["error"], _reinstall("torch"))
        return
    yield from _torch(torch)
    blamed = set()
    for name in ("transformers", "peft", "soundfile", "attention"):
        facts = found[name]
        if "error" not in facts:
            yield Finding(name, "ok", facts["why"] if name == "attention" else f"{name} {facts['version']}")
            continue
        culprit = _package_name(facts.get("culprit") or name)
        if culprit in (name, "surgvqa"):
            yield Finding(name, "bad", f"cannot be imported: {facts['error']}", _reinstall(name))
        elif culprit not in blamed:
            blamed.add(culprit)
            text = f"{name} cannot be imported because importing {culprit} fails: {facts['error']}"
            yield Finding(culprit, "bad", text, _reinstall(culprit))
    yield from _flash_attn(found["flash_attn"], torch)
    if "error" in found["wandb"]:
        why = f"cannot be imported: {found['wandb']['error']}; --report_to wandb needs it"
        yield Finding("wandb", "warn", why, _reinstall("wandb"))
    bitsandbytes = found["bitsandbytes"]
    if not torch["cuda"] or "bitsandbytes" in blamed:
        return
    if "error" in bitsandbytes:
        yield Finding(
            "bitsandbytes",
            "warn",
            f"{bitsandbytes['error']}; the optimiser uses 32-bit moments: 1 GB more",
            _reinstall("bitsandbytes"),
        )
    else:
        yield Finding("bitsandbytes", "ok", f"bitsandbytes {bitsandbytes['version']}: 8-bit AdamW runs")


def _flash_attn(facts: dict[str, Any], torch: dict[str, Any]) -> Iterator[Finding]:
    """Reports flash-attn only if it is installed and broken, because torch's own kernels are good enough."""
    if "error" in facts:
        mend = "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps flash-attn"
        why = f"cannot be imported: {facts['error']}; it is built for one torch, and this is {torch['version']}"
        yield Finding("flash-attn", "warn", why, f"{mend}, or pip uninstall flash-attn")
    elif facts["version"]:
        yield Finding("flash-attn", "ok", f"flash-attn {facts['version']}")


def _package_name(module: str) -> str:
    """The name of a module's package for pip: flash-attn for flash_attn, pillow for PIL."""
    return importlib.metadata.packages_distributions().get(module, [module])[0]


def _reinstall(package: str) -> str:
    """How to repair a package whose import fails. One that training does not need may be uninstalled instead."""
    if package == "torch":
        return "reinstall torch for this driver: https://pytorch.org"
    if package == "attention" or (package in TRAIN_PACKAGES and version(package) is None):
        return TRAIN_EXTRA
    if package in _needed():
        return f"pip install --upgrade --force-reinstall {package}"
    cost = " (AdamW then keeps 32-bit moments: 1 GB more)" if package == "bitsandbytes" else ""
    return f"pip install -U {package}, or pip uninstall {package}{cost}"


def _needed() -> set[str]:
    """The packages that training needs, and those that they need themselves."""
    needed = set(TRAIN_PACKAGES)
    for package in TRAIN_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            needs = map(Requirement, importlib.metadata.requires(package) or [])
            needed |= {need.name for need in needs if need.marker is None}
    return needed


def _why_no_cuda(built_for: str | None) -> tuple[str, str]:
    """(why torch sees no GPU although the driver has one, how to repair it)."""
    driver, runs = gpu.driver_version()
    if not built_for:
        index = f"https://download.pytorch.org/whl/cu{runs.replace('.', '')}" if runs else "https://pytorch.org"
        return "was built without CUDA", f"pip install --force-reinstall torch --index-url {index}"
    if runs and tuple(map(int, built_for.split("."))) > tuple(map(int, runs.split("."))):
        return (
            f"driver {driver} runs CUDA up to {runs} only",
            f"update the driver (nvidia-smi names its version), or install torch for CUDA {runs}: https://pytorch.org",
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"sees no GPU; CUDA_VISIBLE_DEVICES is {hidden!r}", "unset CUDA_VISIBLE_DEVICES"
    mend = "python -c 'import torch; torch.cuda.init()' says why; in a container: docker run --gpus all …"
    return "sees no GPU although its driver is new enough", mend


def _torch(torch: dict[str, Any]) -> Iterator[Finding]:
    built = f"torch {torch['version']}" + (f" for CUDA {torch['built_for']}" if torch["built_for"] else ", CPU only")
    if not torch["cuda"]:
        if _driver_problem() is None:
            why, mend = _why_no_cuda(torch["built_for"])
            yield Finding("torch", "bad", f"{built}: {why}", mend)
        else:
            yield Finding("torch", "info", f"{built}: trains on the CPU, which is enough only for the demo")
        return
    yield Finding("torch", "ok", built)
    for device in torch["gpus"]:
        major, minor = device["capability"]
        text = f"{device['name']}: compute capability {major}.{minor}, {device['memory'] / 1e9:.0f} GB"
        if not any(a.endswith(f"_{major}{minor}") or a.startswith(f"sm_{major}") for a in torch["architectures"]):
            yield Finding("cuda", "bad", f"{text}; this torch has no code for it", "install a newer torch")
        elif (major, minor) < (8, 0):
            yield Finding(
                "cuda", "warn", f"{text}; no bfloat16 units before Ampere: slow", "use an Ampere or newer GPU"
            )
        else:
            yield Finding("cuda", "ok", text)


# --- on the screen ---------------------------------------------------------------------------------------------------

MARKS = {"ok": ("✓", "green"), "info": ("·", "dim"), "warn": ("!", "yellow"), "bad": ("✗", "red")}


def _show(console: Any, findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    for finding in findings:
        mark, colour = MARKS[finding.status]
        table.add_row(Text(mark, colour), Text(finding.name, "bold"), Text(finding.text))
        if finding.mend:
            table.add_row("", "", Text(f"→ {finding.mend}", colour))
    console.print(table)
