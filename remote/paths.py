"""Turns local paths into paths on the host, which must stay inside the workspace.

No parameter is on a command line: parameters are JSON on the agent's standard input (see agent/). A remote shell sees
only the name of the host's Python and the constant bootstrap.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from surgvqa.config.workspace import Workspace
from surgvqa.errors import UsageError


def inside(path: str, what: str = "path") -> str:
    """`path` as a relative POSIX path. Raises UsageError if it could leave its root."""
    pure = PurePosixPath(path)
    if not path or "\0" in path or pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise UsageError(f"{what} {path!r}: expected a path inside the workspace, without ..")
    return str(pure)


def remote_name(path: str | os.PathLike[str], workspace: Workspace, made_there: bool = False) -> str:
    """The path on the host of a local path, relative to the workspace.

    It is the same as here for a path inside the workspace, and the last part of any other path. `made_there`: a job on
    the host makes it, so it may be below runs/. Raises UsageError for reserved names.
    """
    absolute = Path(os.path.abspath(os.path.expanduser(path)))
    root = Path(os.path.abspath(workspace.root))
    name = absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else absolute.name
    reserved = (".surgvqa", "venv") if made_there else (".surgvqa", "venv", "runs")
    if name in ("", ".") or name.split("/")[0] in reserved:
        raise UsageError(f"{path}: cannot have the name {name or '.'!r} in the host's workspace; move or rename it")
    return inside(name)
