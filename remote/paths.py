"""What may become a remote path: only what stays inside the workspace.

Parameters never travel on a command line at all: they are JSON on the agent's standard input (see agent/). The only
words that a remote shell sees are the host's Python and the constant bootstrap.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from surgvqa.errors import UsageError


def inside(path: str, what: str = "path") -> str:
    """`path` as a relative POSIX path that cannot leave its root; UsageError otherwise."""
    pure = PurePosixPath(path)
    if not path or "\0" in path or pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise UsageError(f"{what} {path!r}: expected a path inside the workspace, without ..")
    return str(pure)
