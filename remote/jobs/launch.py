"""Jobs on a host: launch, wait, follow across lost connections, stop, list."""

from __future__ import annotations

import os
from typing import Any

from remote.paths import remote_name
from remote.ssh.connection import Remote
from surgvqa.cli.commands import COMMANDS
from surgvqa.config.options import COMMAND_OPTIONS
from surgvqa.config.settings import NONE, Path_, Setting, nearest, settings_of
from surgvqa.config.workspace import Workspace
from surgvqa.errors import UsageError
from surgvqa.runs.launch import STOP_GRACE_S

SECRETS = ("WANDB_API_KEY", "HF_TOKEN")
"""Taken from our environment; they travel on standard input and are on no command line, in no log, in no run.json."""
EXCLUSIVE = ("train", "evaluate")
"""Commands that want the GPU for themselves."""
MADE_THERE = ("output_path", "output_dir", "feature_cache_dir")
"""Paths that a job makes itself; the others are its input."""


def check_command(command: str) -> None:
    """UsageError for what has no run folder, by which a job on the host is known."""
    known = [name for name, row in COMMANDS.items() if row.job]
    if command not in known:
        hint = nearest(command, known)
        raise UsageError(f"{command}: not a job that a host can run; those are {', '.join(known)}{hint}")


def paths_for_host(command: str, argv: list[str], workspace: Workspace) -> tuple[list[str], list[str]]:
    """`argv` with local paths turned into their names on the host, and the inputs that must be there."""
    settings = settings_of(COMMAND_OPTIONS[command])
    turned: list[str] = []
    needs: list[str] = []

    def there(option: Setting | None, value: str) -> str:
        if option is None or option.type is not Path_ or (option.optional and value in NONE):
            return value
        if option.name == "checkpoint" and not os.path.exists(value):
            return value  # a run id of the host
        name = remote_name(value, workspace, made_there=True)
        if option.name not in MADE_THERE:
            needs.append(name)
        return name

    option = None
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            option = settings.get(name)
            turned.append(f"--{name}={there(option, value)}" if equals else word)
        else:
            turned.append(there(option, word))
    return turned, needs


def resume_argv(argv: list[str], run_id: str) -> list[str]:
    """The arguments of a run, to go on with it: --resume names the run; what was meant for that alone is dropped."""
    kept, skip = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif name in ("--resume", "--run_id", "--workspace"):
            skip = not equals
        else:
            kept.append(word)
    return [*kept, "--resume", run_id]


def launch(
    remote: Remote,
    command: str,
    argv: list[str],
    *,
    needs: list[str],
    exclusive: bool | None = None,
    share: bool = False,
) -> dict[str, Any]:
    """Starts the job; it lives on without us. Returns its run id and folder there."""
    check_command(command)
    return remote.call(
        "launch",
        venv=remote.host.entry.venv,
        command=command,
        argv=argv,
        needs=needs,
        env=remote.host.entry.environment,
        secrets={name: os.environ[name] for name in SECRETS if os.environ.get(name)},
        exclusive=(command in EXCLUSIVE if exclusive is None else exclusive) and not share,
    )


def stop(remote: Remote, run: str, grace_s: float = STOP_GRACE_S) -> dict[str, Any]:
    """Asks the run to end, by force after `grace_s` seconds; returns its state."""
    return remote.call("stop", run=run, grace_s=grace_s)
