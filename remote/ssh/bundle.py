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

from surgvqa import __version__

MODULES = (
    "surgvqa.errors",
    "surgvqa.untrusted",
    "surgvqa.files",
    "surgvqa.runs.process",
    "surgvqa.runs.events",
    "surgvqa.runs.supervisor",
    "surgvqa.runs.state",
    "surgvqa.runs.ranks",
    "surgvqa.runs.folder",
    "surgvqa.runs.history",
    "remote.agent.protocol",
    "remote.agent.manifest",
    "remote.agent.files",
    "remote.agent.standing",
    "remote.agent.staging",
    "remote.agent.receiving",
    "remote.agent.disk",
    "remote.agent.machine",
    "remote.agent.runs",
    "remote.agent.jobs",
    "remote.agent.nodes",
    "remote.agent.results",
    "remote.agent.ending",
    "remote.agent.main",
)
"""Beside __version__; standard library only, Python 3.8. The last one has main()."""

TOO_OLD = "is too old for surgvqa"
READS_OURS = "the login shell here reads the standard input that is ours; mend its ~/.bashrc"
BOOTSTRAP = (
    f"import sys,zlib;sys.version_info<(3,8)and sys.exit('Python '+sys.version.split()[0]+' {TOO_OLD}');"
    f"i=sys.stdin.buffer;n=i.readline();n.strip().isdigit()or sys.exit('{READS_OURS}');"
    "exec(compile(zlib.decompress(i.read(int(n))),'surgvqa-agent','exec'))"
)


def bootstrap(python: str) -> str:
    """The remote command: the only words that the host's shell reads."""
    home = "~/" if python.startswith("~/") else ""  # the one thing that the shell is to fill in
    return f'{home}{shlex.quote(python[len(home) :])} -I -S -X utf8 -c "{BOOTSTRAP}"'


@functools.cache
def _agent() -> bytes:
    root = Path(__file__).parents[2]
    packages = {name.rsplit(".", depth)[0] for name in MODULES for depth in (1, 2)} - {*MODULES}
    sources = {**dict.fromkeys(sorted(packages), ""), "surgvqa": f"__version__ = {__version__!r}"}
    for name in MODULES:
        sources[name] = root.joinpath(*name.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    lines = [
        "import sys",
        f"S={sources!r}",
        "class Sent:",  # finds what was sent; a module that no request needs is not even compiled
        " def find_spec(self,name,*_): return type(sys.__spec__)(name,self,is_package=True) if name in S else None",
        " def create_module(self,spec): return None",
        " def exec_module(self,m): exec(compile(S[m.__name__],m.__name__,'exec'),m.__dict__)",
        "sys.meta_path.insert(0,Sent())",
        f"import {MODULES[-1]}",
        f"{MODULES[-1]}.main(i)",
    ]
    return zlib.compress("\n".join(lines).encode(), 6)


def payload(request: dict[str, Any]) -> bytes:
    """What is written to the host's Python: the agent, then the request as one line."""
    agent = _agent()
    return b"%d\n%s%s" % (len(agent), agent, request_line(request))


def request_line(request: dict[str, Any]) -> bytes:
    """A further request to an agent that waits for one."""
    return json.dumps(request).encode() + b"\n"
