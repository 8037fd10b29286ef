"""What each question to the host is answered with: an answer of another shape is refused before anybody uses it."""

from __future__ import annotations

from typing import Any

from remote.ssh.errors import not_understood
from remote.ssh.hosts import Host
from surgvqa.runs.state import FIELDS as RUN_FIELDS
from surgvqa.untrusted import json_kind, of_kinds

SIZE = "a size"
"""A whole number from 0 to 2**63: bytes, files."""
NUMBER = (int, float)
LISTED = "a listed file"
"""[path, size, time]."""
STAND = {
    "state": str,
    "have": [SIZE],
    "foreign": [str],
    "published": (bool, None),
    "stale": [str],
    "stale_files": SIZE,
    "replaced": bool,
}
GPU = {
    "index": (int, str),
    **dict.fromkeys(("name", "uuid", "state", "problem"), (str, None)),
    **dict.fromkeys(
        (
            "mig_index",
            "memory_used_bytes",
            "memory_total_bytes",
            "utilization_percent",
            "power_w",
            "power_limit_w",
            "temperature_c",
        ),
        (*NUMBER, None),
    ),
    "processes": ([{"pid": int, "name": (str, None), "used_bytes": (*NUMBER, None)}], None),
}
RUN = {
    **dict.fromkeys(("id", "command", "state", "name", "host", "folder", "problem"), str),
    "started": NUMBER,
    "steps": SIZE,
}
SHAPES: dict[str, dict[str, Any]] = {
    "probe": {
        **dict.fromkeys(("workspace", "venv", "python", "python_version"), str),
        **dict.fromkeys(("has_venv", "writable", "aes"), bool),
        "free": SIZE,
        "cpus": (SIZE, None),
        "installed": (dict, None),
    },
    "prepare": {"wheel": str, "constraints": str},
    "execute": {"line": (str, None), "exit_code": (int, None)},
    "launch": {"run": str, "folder": str, "warning": str},
    "contents": {"contents": [{"path": str, "digest": str, "files": SIZE, "rows": [[str]]}]},
    "listen": {"port": SIZE, "addresses": [{"address": str, "interface": str}]},
    "reach": {"reached": [{"address": str, "interface": str}]},
    "runs": {"runs": [RUN], "time": NUMBER},
    "run": {"id": str, "state": str, "run": dict, "folders": [str]},
    "listing": {"files": [LISTED]},
    "stop": {"run": str, "state": str, "before": str, "seconds": NUMBER},
    "gpus": {"gpus": [GPU], "note": (str, None)},
    "known": {"items": [STAND], "free": SIZE, "stagings": SIZE},
    "begin": {"complete": bool, "removed": (SIZE, None)},
    "retire": {"removed": [str], "removed_files": SIZE, "changed": [str]},
    "merged": {"same": bool},
    "abandoned": {"uploads": [{"name": str, "bytes": SIZE, "note": str}]},
    "disk": {
        "workspace": str,
        **dict.fromkeys(("free_bytes", "total_bytes", "more"), SIZE),
        "complete": bool,
        "entries": [
            {
                **dict.fromkeys(("name", "kind", "in_use", "note"), str),
                **dict.fromkeys(("bytes", "files"), SIZE),
                "age_s": (*NUMBER, None),
                "ours": bool,
            }
        ],
    },
    "clean": {"cleaned": [str], "cleaned_bytes": SIZE},
    "end_from_here": {"pid": int, "warning": str},
    "ending": {"stage": (str, None), "problem": (str, None), "alive": (bool, None)},
}
"""By operation ("run" is the operation "runs" that asks for one): the keys that are relied on. A tuple has several
kinds of value, None also where the key is missing; a list has the kind of its items, a dict is an object with these
keys.
Streams that are read message by message (follow, send, receive, verify) are checked where they are read."""
ABOUT_ITEMS = ("known", "begin", "publish", "retire")


def checked(host: Host, op: str, params: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """The answer to `op`. Raises for one of another shape than this side relies on."""
    if op in ABOUT_ITEMS and isinstance(answer.get("want"), dict):  # rows of a manifest come first (manifest.py)
        return answer
    name = "run" if op == "runs" and params.get("run") is not None else op
    for key, kind in SHAPES.get(name, {}).items():
        if not fits(answer.get(key), kind):
            raise not_understood(host, f"{key} is {json_kind(answer.get(key))[:20]}: {str(answer.get(key))[:60]}")
    if name == "run":
        known, _ = of_kinds(answer["run"], RUN_FIELDS)  # as whoever reads the file itself has it
        return {**answer, "run": {key: value for key, value in known.items() if value is not None}}
    return answer


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind as SHAPES has it."""
    if isinstance(kind, tuple):
        return any(fits(value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(value.get(key), one) for key, one in kind.items())
    if kind is None:
        return value is None
    if kind == SIZE:
        return type(value) is int and 0 <= value < 1 << 63
    if kind == LISTED:
        return isinstance(value, list) and len(value) == 3 and isinstance(value[0], str) and fits(value[1:], [SIZE])
    if kind is float:
        return isinstance(value, float) and json_kind(value) == "a number"
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
