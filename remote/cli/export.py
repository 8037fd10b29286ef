"""`surgvqa-remote export`: the job file with which SkyPilot, dstack or Slurm do what `launch` does on a host of ours.

Beside it go our wheel and the versions that it is tested with: the job installs them with pip and needs nothing else.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from remote.jobs.launch import MADE_THERE, check_command, paths_for_host
from remote.setup import build_wheel, constraints
from surgvqa.config.options import COMMAND_OPTIONS
from surgvqa.config.settings import Path_, settings_of
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.files import write_synced
from surgvqa.outcome import Outcome
from surgvqa.terminal.drawing import plain

VERSIONS = "surgvqa-constraints.txt"
TO_THE_END_S = 120
"""Before a limit of time strikes, a training has so long to save its state and to end."""
NAME = re.compile("[a-z][a-z0-9-]{0,39}")
GPU = re.compile("[A-Za-z0-9][A-Za-z0-9-]{0,30}")


def export(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Writes the job file, the wheel and the constraints into the workspace."""
    tool = next(tool for tool in TOOLS if getattr(arguments, tool))
    command, *argv = arguments.job or ["train"]
    check_command(command)
    if not NAME.fullmatch(arguments.name):
        raise UsageError(f"--name {arguments.name!r}: expected a to z, 0 to 9 and dashes, at most 40, a letter first")
    if not GPU.fullmatch(arguments.gpu):
        raise UsageError(f"--gpu {arguments.gpu!r}: expected a name such as H100 or A100-80GB")
    if not 0 < arguments.hours <= 24 * 30:
        raise UsageError(f"--hours {arguments.hours:g}: expected more than 0, at most {24 * 30}")
    file = workspace.root / FILES[tool]
    commands = [[command, *_with_paths(command, argv, workspace)]]
    if command == "train":
        commands.append(["evaluate", *_with_paths("evaluate", _shared(argv), workspace)])
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder))
        try:
            text = TOOLS[tool](arguments, wheel.name, commands)
            shutil.copy(wheel, workspace.root / wheel.name)
            write_synced(workspace.root / VERSIONS, constraints(with_torch=True).encode())
            write_synced(file, text.encode())
        except OSError as error:
            raise SurgvqaError(f"{workspace.root}: {error.strerror}") from None
    data = {"tool": tool, "file": str(file), "wheel": wheel.name, "constraints": VERSIONS, "commands": commands}
    said = f"{file.name}, {wheel.name}, {VERSIONS}\n{START[tool].format(name=arguments.name, file=file.name)}"
    return Outcome(data, show=lambda console: console.print(plain(said)))


def _with_paths(command: str, argv: list[str], workspace: Workspace) -> list[str]:
    """`argv` with every path relative to the workspace, those of surgvqa.toml too. UsageError for one outside."""
    given = {word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    full = list(argv)
    for name, setting in settings_of(COMMAND_OPTIONS[command]).items():
        value = workspace.value(name, command)
        if setting.type is Path_ and value is not None and name not in given and name not in MADE_THERE:
            full += [f"--{name}={one}" for one in (value if isinstance(value, list) else [value])]
    turned, needs = paths_for_host(command, full, workspace)
    for need in needs:
        if not (workspace.root / need).exists():
            raise UsageError(f"{need}: not in {workspace.root}; the job takes this folder along, so move it in")
    return turned


def _shared(argv: list[str]) -> list[str]:
    """The options of a training that say where the evaluation's samples are."""
    from remote.cloud.then import of_the_data

    return of_the_data(["train", *argv])


def _install(wheel: str) -> list[str]:
    return [
        "python3 -m venv venv",
        f"venv/bin/pip install --disable-pip-version-check --constraint {VERSIONS} {shlex.quote(f'./{wheel}[train]')}",
    ]


def _run(hours: float, commands: list[list[str]]) -> list[str]:
    """The job within its time, then the evaluation of that very run; what fails is said at the end."""
    limit = f"timeout --signal=TERM --kill-after={TO_THE_END_S} {max(1, round(hours * 3600))}"
    lines = [f"run=$(date +%Y%m%d-%H%M%S)-{commands[0][0]}-$$", "state=0"]
    for words, before, after in zip(commands, (f"{limit} ", ""), (' --run_id "$run"', ' --checkpoint "$run"')):
        lines.append(f"{before}venv/bin/surgvqa {shlex.join(words)}{after} || state=$?")
    return [*lines, "exit $state"]


def _minutes(hours: float) -> int:
    """Of the whole job: a quarter more than the training has, for its end and the evaluation."""
    return max(1, round(hours * 75)) + TO_THE_END_S // 60


def _block(lines: list[str], indent: int) -> str:
    """A YAML block of literal lines, which has neither line breaks within a word nor control characters."""
    if odd := [line for line in lines if not line.isprintable()]:
        raise UsageError(f"an option holds a line break or a control character, which a job file cannot: {odd[0]!r}")
    return "".join(f"{' ' * indent}{line}\n" for line in lines)


def _skypilot(arguments: argparse.Namespace, wheel: str, commands: list[list[str]]) -> str:
    return (
        f"# {START['skypilot'].format(name=arguments.name, file=FILES['skypilot'])}\n"
        "# sky down ends the machine, and its disk goes with it: fetch runs/ before, as the line above does.\n"
        f"name: {arguments.name}\nworkdir: .\nresources:\n  accelerators: {json.dumps(arguments.gpu + ':1')}\n"
        f"setup: |\n{_block(_install(wheel), 2)}run: |\n{_block(_run(arguments.hours, commands), 2)}"
    )


def _dstack(arguments: argparse.Namespace, wheel: str, commands: list[list[str]]) -> str:
    lines = [*_install(wheel), *_run(arguments.hours, commands)[:-1]]
    lines += ["cp -r runs /results/ || state=1", "exit $state"]
    return (
        f"# {START['dstack'].format(name=arguments.name, file=FILES['dstack'])}\n"
        f"# Results go to the volume {arguments.name}-results, which must be there. `files` takes this folder along:\n"
        "# a server takes 2 MB unless DSTACK_SERVER_CODE_UPLOAD_LIMIT says more.\n"
        f"type: task\nname: {arguments.name}\npython: '3.11'\nfiles:\n  - .:/workspace\nworking_dir: /workspace\n"
        f"volumes:\n  - {arguments.name}-results:/results\n"
        f"resources:\n  gpu:\n    name: {json.dumps(arguments.gpu)}\n    count: 1\n"
        f"max_duration: {_minutes(arguments.hours)}m\n"
        f"commands:\n  - |\n{_block(lines, 4)}"
    )


def _slurm(arguments: argparse.Namespace, wheel: str, commands: list[list[str]]) -> str:
    minutes = _minutes(arguments.hours)
    return (
        f"#!/bin/bash\n# {START['slurm'].format(name=arguments.name, file=FILES['slurm'])}\n"
        "# In this folder on the cluster: copy all of it there first. Results stay in runs/.\n"
        f"#SBATCH --job-name={arguments.name}\n#SBATCH --gres=gpu:{arguments.gpu.lower()}:1\n"
        f"#SBATCH --time={minutes // 60:02d}:{minutes % 60:02d}:00\n#SBATCH --output={arguments.name}-%j.log\n"
        'cd "${SLURM_SUBMIT_DIR:-.}" || exit 1\n'
        "if [ ! -x venv/bin/surgvqa ]; then\n"
        + _block([f"{line} || exit 1" for line in _install(wheel)], 2)
        + "fi\n"
        + _block(_run(arguments.hours, commands), 0)
    )


TOOLS: dict[str, Callable[[argparse.Namespace, str, list[list[str]]], str]] = {
    "skypilot": _skypilot,
    "dstack": _dstack,
    "slurm": _slurm,
}
FILES = {"skypilot": "surgvqa-sky.yaml", "dstack": "surgvqa.dstack.yml", "slurm": "surgvqa-slurm.sh"}
START: dict[str, Any] = {
    "skypilot": "sky launch -y -c {name} {file}; rsync -Paz {name}:sky_workdir/runs . && sky down -y {name}",
    "dstack": "dstack apply -y -f {file}",
    "slurm": "sbatch {file}",
}
