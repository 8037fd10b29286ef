"""What may become a remote path: only what stays inside the workspace.

Parameters never travel on a command line at all: they are JSON on the agent's standard input (see agent/). The only
words that a remote shell sees are the host's Python and the constant bootstrap.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from surgvqa.config.workspace import Workspace
from surgvqa.errors import UsageError


def inside(path: str, what: str = "path") -> str:
    """`path` as a relative POSIX path that cannot leave its root; UsageError otherwise."""
    pure = PurePosixPath(path)
    if not path or "\0" in path or pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise UsageError(f"{what} {path!r}: expected a path inside the workspace, without ..")
    return str(pure)


def remote_name(path: str | os.PathLike[str], workspace: Workspace, made_there: bool = False) -> str:
    """The name on the host of a local path: as it is inside the workspace; its last part when it lies elsewhere.

    `made_there`: it may lie below runs/, which belongs to the host's own jobs.
    """
    absolute = Path(os.path.abspath(os.path.expanduser(path)))
    root = Path(os.path.abspath(workspace.root))
    name = absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else absolute.name
    reserved = (".surgvqa", "venv") if made_there else (".surgvqa", "venv", "runs")
    if name in ("", ".") or name.split("/")[0] in reserved:
        raise UsageError(f"{path}: cannot have the name {name or '.'!r} in the host's workspace; move or rename it")
    return inside(name)
