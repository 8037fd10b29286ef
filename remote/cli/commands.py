"""What each command of `surgvqa-remote` does: hosts, setup, upload, launch, resume, runs, follow, stop, fetch, gpus."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from remote.ssh.errors import not_understood
from remote.upload.options import UploadOptions
from surgvqa.cli.jobs import run_job
from surgvqa.cli.main import say
from surgvqa.cli.parser import normalise
from surgvqa.config.settings import convert, settings_of
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run
from surgvqa.runs.launch import launch as start_detached
from surgvqa.terminal.drawing import plain, terminal
from surgvqa.terminal.figures import human_seconds
from surgvqa.terminal.job_view import JobView
from surgvqa.terminal.reporter import TerminalReporter
from surgvqa.untrusted import log_text


def _connect(arguments: argparse.Namespace, workspace: Workspace) -> Any:
    from remote.ssh.connection import connect

    return connect(arguments.host, workspace.root, arguments.accept_new_host_key)


def hosts(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """The hosts that ~/.ssh/config and hosts.toml name."""
    from remote.setup import skew
    from remote.ssh.connection import Remote
    from remote.ssh.hosts import read_hosts_files, resolve, ssh_config_names

    def look(name: str) -> dict[str, Any]:
        host = resolve(name, workspace.root)
        row: dict[str, Any] = {
            "name": name,
            "hostname": host.hostname,
            "user": host.user,
            "port": host.port,
            "source": host.source,
            "workspace": host.entry.workspace,
            "price_per_hour": host.entry.price_per_hour,
            "gpus": host.entry.gpus,
        }
        if arguments.check:
            began = time.monotonic()
            try:
                with Remote(host) as remote:
                    facts = remote.call("probe", venv=host.entry.venv)
                row |= {"state": "reachable", "seconds": round(time.monotonic() - began, 3)}
                row |= {"free_bytes": facts["free"], "skew": skew(facts["installed"])}
            except SurgvqaError as error:
                row |= {"state": "unreachable", "error": str(error)}
        return row

    names = list(dict.fromkeys([*read_hosts_files(workspace.root), *ssh_config_names()]))
    with ThreadPoolExecutor(max(1, min(8, len(names)))) as pool:  # one that is down holds nobody up
        listed = list(pool.map(look, names))

    def show(console: Console) -> None:
        table = Table("host", "reached as", "from", "per hour", "GPUs", box=None)
        table.columns[0].no_wrap = True  # it is there to be typed
        for row in listed:
            price = "" if row["price_per_hour"] is None else f"{row['price_per_hour']:.2f}"
            reached = f"{row['user']}@{row['hostname']}:{row['port']}"
            table.add_row(*map(plain, (row["name"], reached, row["source"], price, row["gpus"] or "")))
        console.print(table if listed else "no hosts: neither ~/.ssh/config nor hosts.toml names one")
        for row in listed if arguments.check else []:
            console.print(plain(f"{row['name']}: {row.get('error') or row.get('skew') or 'ready'}"))

    return Outcome({"hosts": listed}, show=show)


def _job(command: str, arguments: argparse.Namespace, workspace: Workspace, work: Callable[[Run], Outcome]) -> Outcome:
    """Does `work` with a run folder here; with --detach in a process of its own."""
    if arguments.detach:
        words = normalise(sys.argv[1:])
        words = [word for word in words[words.index(command) + 1 :] if word not in ("--detach", "--json")]
        folder = start_detached(command, words, Path.cwd(), workspace.runs_dir, module="remote")
        return Outcome(
            {"run": folder.name, "folder": str(folder)}, show=lambda console: console.print(plain(folder.name))
        )
    recorded = {k: {"value": v, "from": "command line"} for k, v in vars(arguments).items() if k != "command"}
    run = Run.create(workspace.runs_dir, command, run_id=arguments.run_id, options=recorded, workspace=workspace.root)
    return run_job(run, work)


def set_up(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Installs this version on the host."""
    from remote.setup import setup

    def work(run: Run) -> Outcome:
        run.phase("connect", arguments.host)
        with _connect(arguments, workspace) as remote:
            data = setup(
                remote,
                run,
                extra=arguments.extra,
                system_site_packages=arguments.system_site_packages,
                flash_attn=arguments.flash_attn,
                force=arguments.force,
            )
        what = "installed" if data["changed"] else "was there already"
        text = f"{arguments.host}: surgvqa {data['version']} {what}, {human_seconds(data['seconds'])}"
        return Outcome(data, show=lambda console: console.print(plain(text)))

    return _job("setup", arguments, workspace, work)


def upload(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Brings checkpoints and data to the host."""
    from remote.upload import command

    known = settings_of(UploadOptions)
    given = {k: convert(known[k], v, "command line") for k, v in vars(arguments).items() if k in known}
    options = UploadOptions(**given)
    command.check(options, workspace)
    return _job(
        "upload",
        arguments,
        workspace,
        lambda run: command.upload(options, run, workspace, arguments.host, arguments.accept_new_host_key),
    )


def launch(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Starts a job on the host."""
    from remote.jobs import launch as jobs

    if not arguments.job:
        raise UsageError("name the command to launch: surgvqa-remote launch HOST train …")
    command, *argv = arguments.job
    jobs.check_command(command)
    argv, needs = jobs.paths_for_host(command, argv, workspace)
    with _connect(arguments, workspace) as remote:
        _same_version(remote)
        launched = jobs.launch(remote, command, argv, needs=needs, share=arguments.share)
        return _after_launch(remote, launched, arguments)


def resume(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Goes on with a training on the host from its last checkpoint."""
    from remote.jobs import launch as jobs

    with _connect(arguments, workspace) as remote:
        _same_version(remote)
        found = remote.call("runs", run=arguments.run, command="train")
        if found["state"] in ("running", "starting"):
            raise SurgvqaError(f"{arguments.host}: {found['id']} is {found['state']}; nothing to resume")
        command, *argv = found["run"].get("argv") or ["?"]
        if command != "train":
            raise UsageError(f"{found['id']}: a {command} run cannot be resumed, only train")
        launched = jobs.launch(remote, "train", jobs.resume_argv(argv, found["id"]), needs=[], share=arguments.share)
        return _after_launch(remote, launched, arguments)


def _same_version(remote: Any) -> None:
    """Refuses to start jobs with another version of us than this side."""
    from remote.setup import skew

    facts = remote.call("probe", venv=remote.host.entry.venv)
    problem = skew(facts["installed"])
    if problem and not os.path.isabs(remote.host.entry.venv):  # a venv of the user's own is his to keep
        raise SurgvqaError(f"{remote.host.name}: {problem} {remote.host.name}")


def _after_launch(remote: Any, launched: dict[str, Any], arguments: argparse.Namespace) -> Outcome:
    if launched["warning"]:
        say(f"surgvqa-remote: warning: {launched['warning']}")
    if arguments.follow or arguments.wait:
        return _watch(remote, launched["run"], quiet=arguments.wait, log=False)
    return Outcome(launched, show=lambda console: console.print(plain(launched["run"])))


def _watch(remote: Any, run: str, quiet: bool, log: bool) -> Outcome:
    """Draws a run's events until it ends; Ctrl-C leaves the run alone."""
    from remote.jobs.follower import Follower

    view, follower = JobView(), Follower(remote, run)
    try:
        for event in follower:
            kind = event["kind"]
            if kind == "connection" and event["state"] == "unreachable":
                since = time.strftime("%H:%M:%S", time.localtime(event["since"]))
                view.console.print(f"unreachable since {since}: {event['text']}", markup=False)
            elif kind == "connection":
                view.console.print("connected again")
            elif quiet:
                continue
            elif kind == "log" and log:
                view.console.print(log_text(event["text"]), end="", markup=False)
            elif kind == "error":
                view.console.print(f"error: {event.get('text')}", markup=False)
            elif kind not in ("log", "state"):
                view.show(event)
    finally:
        view.close()
    finished = follower.outcome.get("finished") or {}
    data = {"run": follower.run, "state": follower.state, **(finished.get("result") or {})}
    good = follower.state in ("finished", "stopped") and not finished.get("exit_code")
    return Outcome(data, ok=good, show=lambda console: console.print(plain(f"{follower.run}: {follower.state}")))


def runs(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """The runs on the host."""
    with _connect(arguments, workspace) as remote:
        data = remote.call("runs")
    if not _is_run_list(data):
        raise not_understood(remote.host, "a list of runs that is none")

    def show(console: Console) -> None:
        table = Table("run", "command", "state", "started", "steps", "name", box=None)
        table.columns[0].no_wrap = table.columns[3].no_wrap = True  # the id is there to be copied
        for r in data["runs"]:
            ago = human_seconds(max(0, data["time"] - r["started"]))  # the host's clock, whatever ours says
            table.add_row(*map(plain, (r["id"], r["command"], r["state"], f"{ago} ago", r["steps"] or "", r["name"])))
        console.print(table if data["runs"] else plain(f"no runs on {arguments.host}"))

    return Outcome({"runs": data["runs"]}, show=show)


def _is_run_list(data: dict[str, Any]) -> bool:
    types: dict[str, Any] = {
        "id": str,
        "command": str,
        "state": str,
        "started": (int, float),
        "steps": int,
        "name": str,
    }
    rows = data.get("runs")
    return (
        isinstance(rows, list)
        and isinstance(data.get("time"), (int, float))
        and all(isinstance(row, dict) and all(isinstance(row.get(k), t) for k, t in types.items()) for row in rows)
    )


def follow(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Follows a run on the host until it ends."""
    with _connect(arguments, workspace) as remote:
        return _watch(remote, arguments.run, quiet=arguments.json, log=arguments.log)


def stop(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Ends a run on the host."""
    from remote.jobs import launch as jobs

    with _connect(arguments, workspace) as remote:
        data = jobs.stop(remote, arguments.run, arguments.grace)
    was = "" if data["before"] in ("running", "starting") else " (it was not running)"
    text = f"{data['run']}: {data['state']}{was or ' after ' + human_seconds(data['seconds'])}"
    return Outcome(data, show=lambda console: console.print(plain(text)))


def fetch(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Brings a run's files here."""
    from remote.jobs.fetch import fetch_run

    root = Path(arguments.to or workspace.runs_dir)
    with _connect(arguments, workspace) as remote, TerminalReporter() as terminal:
        data = fetch_run(remote, arguments.run, root, terminal, arguments.all)  # that folder is the run's own
    text = f"{', '.join(data['folders'])}: {data['files']} files, verified"
    return Outcome(data, show=lambda console: console.print(plain(text)))


def gpus(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """The GPUs of the host."""
    from surgvqa.machine.gpu import draw

    watch = arguments.watch
    if watch is not None and not 0.05 <= watch <= 3600:
        raise UsageError(f"--watch {watch:g}: expected seconds between 0.05 and 3600")
    with _connect(arguments, workspace) as remote:
        venv = remote.host.entry.venv
        if watch is None:
            data = remote.call("gpus", venv=venv, watch=None)
            return Outcome(data, show=lambda console: console.print(draw(data["gpus"], data.get("note"))))
        console = terminal()
        with suppress(KeyboardInterrupt):
            for sample in remote.stream("gpus", venv=venv, watch=watch):
                if arguments.json:
                    print(json.dumps(sample), flush=True)
                else:
                    console.print(draw(sample["gpus"], sample.get("note")))
        return Outcome({"gpus": []})
