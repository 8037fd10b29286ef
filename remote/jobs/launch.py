"""Starts and stops jobs on a host."""

from __future__ import annotations

import os
import secrets
from typing import Any

from remote.paths import remote_name
from remote.ssh.connection import Remote
from surgvqa.cli.commands import COMMANDS
from surgvqa.config.options import COMMAND_OPTIONS
from surgvqa.config.settings import NONE, Path_, Setting, nearest, settings_of
from surgvqa.config.workspace import Workspace
from surgvqa.errors import UsageError
from surgvqa.runs.process import STOP_GRACE_S

SECRETS = ("WANDB_API_KEY", "HF_TOKEN")
"""Variables of our environment that go to the host through standard input: never in a command line, log or run.json."""
EXCLUSIVE = ("train", "evaluate")
"""Commands that need exclusive use of the GPU."""
MADE_THERE = ("output_path", "output_dir", "feature_cache_dir")
"""Paths that a job creates. All others are inputs."""


def check_command(command: str) -> None:
    """Raises UsageError for a command without a run folder, because the host identifies a job by that folder."""
    known = [name for name, row in COMMANDS.items() if row.job]
    if command not in known:
        hint = nearest(command, known)
        raise UsageError(f"{command}: not a job that a host can run; those are {', '.join(known)}{hint}")


def paths_for_host(command: str, argv: list[str], workspace: Workspace) -> tuple[list[str], list[str]]:
    """`argv` with local paths replaced by paths on the host, and the inputs that must exist there."""
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
    """The arguments that resume a run: adds --resume and drops those that applied only to the first start."""
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
    token: str = "",
    env: dict[str, str] | None = None,
    node: int = 0,
    run: str = "",
) -> dict[str, Any]:
    """Starts a job, which does not depend on this process, and returns its run id and folder on the host.

    The job starts once even if a lost connection makes us send the request again, because the host recognises the
    launch by its hexadecimal `token`. A caller that may be killed and repeat the launch must store the token. Variables
    in hosts.toml override `env`. `node` and `run` are for training on several hosts (nodes.py).
    """
    check_command(command)
    return remote.call(
        "launch",
        token=token or secrets.token_hex(4),
        venv=remote.host.entry.venv,
        command=command,
        argv=argv,
        needs=needs,
        env={**(env or {}), **remote.host.entry.environment},
        secrets={name: os.environ[name] for name in SECRETS if os.environ.get(name)},
        exclusive=(command in EXCLUSIVE if exclusive is None else exclusive) and not share,
        node=node,
        run=run,
    )


def stop(remote: Remote, run: str, grace_s: float = STOP_GRACE_S) -> dict[str, Any]:
    """Asks the run to end, kills it after `grace_s` seconds, and returns its state."""
    return remote.call("stop", run=run, grace_s=grace_s)
