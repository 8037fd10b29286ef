"""The agent as it travels: our own sources, compressed, on the standard input of the host's Python.

So the host-side logic is always of the same version as this side, needs nothing installed there but Python (3.8 or
newer), and no parameter ever meets a shell.
"""

from __future__ import annotations

import functools
import json
import shlex
import zlib
from pathlib import Path
from typing import Any

MODULES = (
    "surgvqa",
    "surgvqa.errors",
    "surgvqa.untrusted",
    "surgvqa.files",
    "surgvqa.runs.process",
    "surgvqa.runs.events",
    "surgvqa.runs.supervisor",
    "surgvqa.runs.state",
    "surgvqa.runs.folder",
    "surgvqa.runs.history",
    "remote.agent.protocol",
    "remote.agent.files",
    "remote.agent.staging",
    "remote.agent.machine",
    "remote.agent.runs",
    "remote.agent.jobs",
    "remote.agent.main",
)
"""Standard library only, Python 3.8; in the order in which they import each other; the last one has main()."""

TOO_OLD = "is too old for surgvqa"
BOOTSTRAP = (
    f"import sys,zlib;sys.version_info<(3,8)and sys.exit('Python '+sys.version.split()[0]+' {TOO_OLD}');"
    "i=sys.stdin.buffer;n=int(i.readline());"
    "exec(compile(zlib.decompress(i.read(n)),'surgvqa-agent','exec'))"
)


def bootstrap(python: str) -> str:
    """The remote command: the only words that the host's shell reads."""
    home = "~/" if python.startswith("~/") else ""  # the one thing that the shell is to fill in
    return f'{home}{shlex.quote(python[len(home) :])} -I -S -X utf8 -c "{BOOTSTRAP}"'


@functools.cache
def _agent() -> bytes:
    root = Path(__file__).parents[2]
    sources = {}
    for name in MODULES:
        path = root.joinpath(*name.split("."))
        sources[name] = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    packages = {name.rsplit(".", depth)[0] for name in MODULES for depth in (1, 2)} - {*MODULES}
    lines = [
        "import sys,types",
        f"S={sources!r}",
        f"for p in (*{sorted(packages)!r},*S):",
        " m=types.ModuleType(p); m.__path__=[]; sys.modules[p]=m",
        "for p in S:",
        " exec(compile(S[p],p,'exec'),sys.modules[p].__dict__)",
        f"sys.modules[{MODULES[-1]!r}].main(i)",
    ]
    return zlib.compress("\n".join(lines).encode(), 6)


def payload(request: dict[str, Any]) -> bytes:
    """What is written to the host's Python: the agent, then the request as one line."""
    agent = _agent()
    return b"%d\n%s%s" % (len(agent), agent, request_line(request))


def request_line(request: dict[str, Any]) -> bytes:
    """A further request to an agent that waits for one."""
    return json.dumps(request).encode() + b"\n"
