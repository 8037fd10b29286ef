"""What opens fast and runs on a laptop without torch stays so: each light module, imported in a process of its own."""

import pkgutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

NUMERIC = ("torch", "numpy", "transformers", "peft")
SCREEN_AND_NETWORK = ("textual", "fabric", "paramiko")

ENGINE = [
    "surgvqa.cli",
    "surgvqa.config",
    "surgvqa.runs",
    "surgvqa.machine",
    "surgvqa.terminal",
    "surgvqa.files",
    "surgvqa.errors",
    "surgvqa.outcome",
    "surgvqa.checkpoint",
    "surgvqa.merge.command",
    "surgvqa.data.samples",
    "surgvqa.data.lookup",
    "surgvqa.data.check",
    "surgvqa.prepare",
    "surgvqa.model.sizes",
    "surgvqa.memory",
    "surgvqa.training.command",
    "surgvqa.training.results",
    "surgvqa.training.checkpoints",
    "surgvqa.training.schedule",
    "surgvqa.evaluation.command",
    "surgvqa.evaluation.compare",
    "surgvqa.evaluation.merge",
    "surgvqa.evaluation.train",
    "surgvqa.evaluation.ask",
    "surgvqa.evaluation.interactive",
    "surgvqa.evaluation.score",
    "surgvqa.evaluation.resume",
    "surgvqa.provenance",
    "surgvqa.probe.command",
    "surgvqa.report",
    "surgvqa.evidence",
    "surgvqa.demo.job",
    "presets",
]
"""Rooms, and single modules of the rooms that compute."""
HEAVY = {
    "surgvqa.checkpoint.torch_tensors": "tensors as torch sees them",
    "surgvqa.memory.out_of_memory": "reads torch's allocator",
}


def modules(room: str) -> list[str]:
    spec = find_spec(room)
    below = pkgutil.walk_packages(spec.submodule_search_locations or [], f"{room}.")
    return [room, *(module.name for module in below if not module.name.endswith("__main__"))]


def found_in(module: str, packages: tuple[str, ...]) -> set[str]:
    code = f"import sys, {module}; print(*sorted({{*{packages}}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("rooms", "packages"),
    [
        (ENGINE, (*NUMERIC, *SCREEN_AND_NETWORK)),
        (["tui"], (*NUMERIC, "fabric", "paramiko")),
        (
            ["remote.cli", "remote.agent", "remote.paths", "remote.jobs", "remote.setup", "remote.cloud"],
            (*NUMERIC, "textual", "fabric", "httpx"),
        ),
    ],
    ids=["engine", "panel", "remote"],
)
def test_a_light_module_imports_nothing_heavy(rooms, packages):
    light = [module for room in rooms for module in modules(room) if module not in HEAVY]
    with ThreadPoolExecutor(2) as pool:
        heavy = {m: found for m, found in zip(light, pool.map(lambda m: found_in(m, packages), light)) if found}
    assert heavy == {}
