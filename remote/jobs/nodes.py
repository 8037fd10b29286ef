"""One training on several hosts: the same content on all of them, a way from each to the first, a launch on each.

The first host has the run folder and the rendezvous, and its ranks come first. Every other host has a folder of its
own, named after the run (runs/ranks.py), with its log and how its part ended.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from remote.jobs import launch as jobs
from remote.jobs.fetch import fetch_run
from remote.paths import remote_name
from remote.ssh.connection import Remote
from remote.ssh.errors import not_understood
from surgvqa.config.options import TrainOptions
from surgvqa.config.settings import NONE, Path_, settings_of
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs.ranks import HOST_VARIABLE, Nodes, node_run
from surgvqa.runs.reporter import Reporter

MOST_ADDRESSES = 32
"""Of the first host that the others try."""
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Which interface gradients go through; gloo would take the one that the host's own name stands for, often loopback."""


def launch(
    remotes: Sequence[Remote],
    command: str,
    argv: list[str],
    workspace: Workspace,
    *,
    needs: list[str],
    share: bool = False,
) -> dict[str, Any]:
    """Starts `command` on all hosts at once, as one run; its id and its folder on the first host. `argv` has the names
    that paths have there.

    Raises SurgvqaError, with nothing left running, when the hosts differ in what they have, do not reach the first one,
    or one of them does not start its part.
    """
    if command != "train":
        raise UsageError(f"{command}: on one host only; several train together")
    same_content(remotes, inputs(argv, workspace))
    nodes, interfaces = meeting(remotes)
    if "--gpus" not in [word.partition("=")[0] for word in argv]:
        argv = [*argv, "--gpus", "all"]
    token, started = secrets.token_hex(4), list[dict[str, Any]]()
    try:
        for node, remote in enumerate(remotes):
            place = Nodes(len(remotes), node, *nodes).environment() | {HOST_VARIABLE: remote.host.name}
            place |= dict.fromkeys(INTERFACE_VARIABLES, interfaces[node]) if interfaces[node] else {}
            words = argv if node == 0 else without_resume(argv)  # rank 0 has the saved state and tells the others
            run = started[0]["run"] if started else ""
            started.append(
                jobs.launch(
                    remote, command, words, needs=needs, share=share, token=token, env=place, node=node, run=run
                )
            )
    except BaseException:
        for remote, launched in zip(remotes, started):
            with suppress(SurgvqaError):
                jobs.stop(remote, launched["run"], 5.0)
        raise
    warnings = [f"{remote.host.name}: {one['warning']}" for remote, one in zip(remotes, started) if one["warning"]]
    hosts = [remote.host.name for remote in remotes]
    return {**started[0], "warning": "; ".join(warnings), "hosts": hosts, "runs": [one["run"] for one in started]}


def inputs(argv: list[str], workspace: Workspace) -> list[str]:
    """What a training reads, by its names on a host: as `argv` has it, else the workspace's settings."""
    given = dict(pairwise(argv)) | dict(word.split("=", 1) for word in argv if word.startswith("--") and "=" in word)
    found: list[str] = []
    for name, setting in settings_of(TrainOptions).items():
        if setting.type is Path_ and name not in jobs.MADE_THERE:
            here = workspace.value(name, "train")
            value = given.get(f"--{name}") or (remote_name(here, workspace, made_there=True) if here else NONE[0])
            found += [] if value in NONE else [value]
    return sorted(set(found))


def same_content(remotes: Sequence[Remote], paths: list[str]) -> None:
    """SurgvqaError, naming a file, where the hosts have not the same files with the same hashes at `paths`."""

    def look(remote: Remote) -> dict[str, tuple[str, int]]:
        found = remote.call("contents", paths=paths)["contents"]
        return {one["path"]: (one["digest"], one["files"]) for one in found}

    with ThreadPoolExecutor(len(remotes)) as pool:  # each may read for a while
        first, *others = pool.map(look, remotes)
    for remote, other in zip(remotes[1:], others):
        for path in paths:
            if other.get(path) != first.get(path):
                raise SurgvqaError(
                    f"{path}: not the same on {remotes[0].host.name} and {remote.host.name} "
                    f"({_difference(remotes[0], remote, path)}); run surgvqa-remote upload for both"
                )


def _difference(one: Remote, other: Remote, path: str) -> str:
    """The first file that differs."""
    rows: list[dict[str, str]] = []
    for remote in (one, other):
        found = remote.call("contents", paths=[path], rows=True)["contents"]
        rows.append({name: sha256 for part in found for name, sha256 in part["rows"]})
    for name in sorted(rows[0].keys() | rows[1].keys()):
        for remote, there in zip((one, other), rows):
            if name not in there:
                return f"{name} is missing on {remote.host.name}"
        if rows[0][name] != rows[1][name]:
            return f"{name or path} differs" if name else "other content"
    return "it has just changed"


def meeting(remotes: Sequence[Remote]) -> tuple[tuple[str, str], list[str]]:
    """((where all meet, HOST:PORT of the first host; a name of this meeting), each host's interface on that way).

    Tried out, from each host. Raises SurgvqaError for one that cannot reach the first."""
    first, *others = remotes
    word = secrets.token_hex(16)
    waiting = first.stream("listen", word=word)
    try:
        here = next(waiting)
        own = {one["address"]: one["interface"] for one in here["addresses"]}
        named = [first.host.entry.node_address] if first.host.entry.node_address else [*own, first.host.hostname]
        addresses = [address for address in dict.fromkeys(named) if _is_address(address)][:MOST_ADDRESSES]
        interfaces: dict[str, list[str]] = {}
        for remote in others:
            answer = remote.call("reach", addresses=addresses, port=here["port"], word=word, end=False)
            for one in answer["reached"]:
                interfaces.setdefault(one["address"], []).append(one["interface"])
            interfaces = {at: found for at, found in interfaces.items() if len(found) > others.index(remote)}
            if not interfaces:
                raise SurgvqaError(
                    f"{remote.host.name}: does not reach {first.host.name} at {', '.join(addresses)}, port "
                    f"{here['port']}; open the ports between them, or set its node_address in hosts.toml"
                )
        address = next(iter(interfaces))
        others[-1].call("reach", addresses=[address], port=here["port"], word=word, end=True)
        for _ in waiting:  # until it has ended, and the port is free
            pass
    except StopIteration:
        raise not_understood(first.host, "no port to meet at") from None
    finally:
        waiting.close()  # type: ignore[attr-defined]  # a generator
    return (f"{address}:{here['port']}", word[:16]), [own.get(address, ""), *interfaces[address]]


def _is_address(text: str) -> bool:
    """An IPv4 address or a host's name, as a host may say it."""
    with suppress(ValueError):
        return ipaddress.ip_address(text).version == 4
    return 0 < len(text) < 254 and all(part.replace("-", "").isalnum() for part in text.split("."))


def without_resume(argv: list[str]) -> list[str]:
    """`argv` without --resume and its value."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word.partition("=")[0] == "--resume":
            skip = "=" not in word
        else:
            kept.append(word)
    return kept


def run_ids(remotes: Sequence[Remote], run: str) -> list[str]:
    """The id of a run on each host; `run` as the first one knows it."""
    found = str(remotes[0].call("runs", run=run)["id"])
    return [node_run(found, node) for node in range(len(remotes))]


def stop(remotes: Sequence[Remote], run: str, grace_s: float) -> dict[str, Any]:
    """Ends a run on all hosts at once; the first host's answer. Raises the first error once all have been asked."""
    ids = run_ids(remotes, run)

    def one(remote: Remote, run_id: str) -> dict[str, Any] | SurgvqaError:
        try:
            return jobs.stop(remote, run_id, grace_s)
        except SurgvqaError as error:
            return error

    with ThreadPoolExecutor(len(remotes)) as pool:
        answers = list(pool.map(one, remotes, ids))
    for answer in answers:
        if isinstance(answer, SurgvqaError):
            raise answer
    first = answers[0]
    assert isinstance(first, dict)
    return {**first, "states": {r.host.name: a["state"] for r, a in zip(remotes, answers) if isinstance(a, dict)}}


def fetch(
    remotes: Sequence[Remote], run: str, root: Path, reporter: Reporter, everything: bool, patience_s: float
) -> dict[str, Any]:
    """Brings the run of the first host into `root`, and the other hosts' folders into that run's folder."""
    first = fetch_run(remotes[0], run, root, reporter, everything, patience_s)
    parts = [first]
    for remote, run_id in zip(remotes[1:], run_ids(remotes, first["run"])[1:]):
        parts.append(fetch_run(remote, run_id, Path(first["folder"]), reporter, everything, patience_s))
    sums = {key: sum(part[key] for part in parts) for key in ("files", "bytes", "received_bytes", "seconds")}
    return {**first, "folders": [folder for part in parts for folder in part["folders"]], **sums}
