"""What each command of `surgvqa-remote` does: hosts, setup, upload, launch, resume, runs, follow, stop, fetch, gpus."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from remote.ssh.patience import Patience
from remote.upload.options import UploadOptions
from surgvqa.cli.jobs import run_job
from surgvqa.cli.main import say
from surgvqa.cli.parser import normalise
from surgvqa.config.settings import convert, require_bounds, settings_of
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

if TYPE_CHECKING:
    from remote.ssh.connection import Remote


COST_EVERY_S = 60.0
"""Between two lines of what a run costs."""


def connect_to(
    arguments: argparse.Namespace,
    workspace: Workspace,
    tell: Callable[[str], None] = lambda text: say(f"surgvqa-remote: {text}"),
) -> Remote:
    """A connection to the host that the command names. `tell` is given what `Patience` tells."""
    from remote.ssh.connection import connect

    patience = Patience(arguments.patience_s, tell)
    return connect(arguments.host, workspace.root, arguments.accept_new_host_key, patience)


@contextmanager
def connect_to_all(arguments: argparse.Namespace, workspace: Workspace) -> Iterator[list[Remote]]:
    """Connections to the hosts that the command names, HOST or HOST1,HOST2,…; UsageError for one named twice."""
    names = arguments.host.split(",")
    if len(set(names)) < len(names) or not all(names):
        raise UsageError(f"{arguments.host}: expected each host once, HOST1,HOST2")
    with ExitStack() as stack:
        yield [
            stack.enter_context(connect_to(argparse.Namespace(**{**vars(arguments), "host": name}), workspace))
            for name in names
        ]


def hosts(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """The hosts that ~/.ssh/config and hosts.toml name."""
    from remote.setup import skew, wrong_clock
    from remote.ssh.connection import Remote
    from remote.ssh.hosts import HOSTS_FILE, read_hosts_files, resolve, ssh_config_names

    wrong: dict[str, UsageError] = {}
    named = [*read_hosts_files(workspace.root, wrong), *wrong, *ssh_config_names()]

    def look(name: str) -> dict[str, Any]:
        if name in wrong:
            unknown = dict.fromkeys(("hostname", "user", "port", "workspace", "price_per_hour", "gpus"))
            return {"name": name, **unknown, "source": HOSTS_FILE, "state": "wrong", "error": str(wrong[name])}
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
                    before = time.time()
                    facts = remote.call("probe", venv=host.entry.venv)
                row |= {"state": "reachable", "seconds": round(time.monotonic() - began, 3)}
                row |= {"free_bytes": facts["free"], "skew": skew(facts["installed"])}
                row["clock"] = wrong_clock(facts.get("time"), before, time.time())
            except SurgvqaError as error:
                row |= {"state": "unreachable", "error": str(error)}
        return row

    names = list(dict.fromkeys(named))
    with ThreadPoolExecutor(max(1, min(8, len(names)))) as pool:  # one that is down holds nobody up
        listed = list(pool.map(look, names))

    def show(console: Console) -> None:
        table = Table("host", "reached as", "from", "per hour", "GPUs", box=None)
        table.columns[0].no_wrap = True  # it is there to be typed
        for row in listed:
            price = "" if row["price_per_hour"] is None else f"{row['price_per_hour']:.2f}"
            reached = "" if row.get("state") == "wrong" else f"{row['user']}@{row['hostname']}:{row['port']}"
            table.add_row(*map(plain, (row["name"], reached, row["source"], price, row["gpus"] or "")))
        console.print(table if listed else "no hosts: neither ~/.ssh/config nor hosts.toml names one")
        for row in [row for row in listed if arguments.check or row.get("state") == "wrong"]:
            said = [row.get("error") or row.get("skew"), row.get("clock")]
            console.print(plain(f"{row['name']}: {'; '.join(filter(None, said)) or 'ready'}"))

    return Outcome({"hosts": listed}, show=show)


def job_of(
    command: str, arguments: argparse.Namespace, workspace: Workspace, work: Callable[[Run], Outcome]
) -> Outcome:
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
        with connect_to(arguments, workspace, run.warning) as remote:
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

    return job_of("setup", arguments, workspace, work)


def upload(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Brings checkpoints and data to the host."""
    from remote.upload import command

    known = settings_of(UploadOptions)
    given = {k: convert(known[k], v, "command line") for k, v in vars(arguments).items() if k in known}
    options = UploadOptions(**given)
    require_bounds(options)
    command.check(options, workspace)
    return job_of(
        "upload",
        arguments,
        workspace,
        lambda run: command.upload(options, run, workspace, arguments.host, arguments.accept_new_host_key),
    )


def launch(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Starts a job on the host."""
    from remote.cli import then
    from remote.jobs import launch as jobs

    if arguments.then or not arguments.job:
        return then.launch(arguments, workspace)
    then.refuse_without_then(arguments)
    command, *argv = arguments.job
    jobs.check_command(command)
    argv, needs = jobs.paths_for_host(command, argv, workspace)
    with connect_to_all(arguments, workspace) as remotes:
        for remote in remotes:
            same_version(remote)
        launched = _launch(remotes, command, argv, needs, arguments.share, workspace)
        return _after_launch(remotes[0], launched, arguments)


def _launch(
    remotes: list[Remote], command: str, argv: list[str], needs: list[str], share: bool, workspace: Workspace
) -> dict[str, Any]:
    from remote.jobs import launch as jobs
    from remote.jobs import nodes

    if len(remotes) > 1:
        return nodes.launch(remotes, command, argv, workspace, needs=needs, share=share)
    return jobs.launch(remotes[0], command, argv, needs=needs, share=share)


def resume(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Goes on with a training on the host from its last checkpoint."""
    from remote.jobs import launch as jobs

    with connect_to_all(arguments, workspace) as remotes:
        for remote in remotes:
            same_version(remote)
        remote = remotes[0]
        found = remote.call("runs", run=arguments.run, command="train")
        if found["state"] in ("running", "starting"):
            raise SurgvqaError(f"{remote.host.name}: {found['id']} is {found['state']}; nothing to resume")
        command, *argv = found["run"].get("argv") or ["?"]
        if command != "train":
            raise UsageError(f"{found['id']}: a {command} run cannot be resumed, only train")
        argv = jobs.resume_argv(argv, found["id"])
        launched = _launch(remotes, "train", argv, [], arguments.share, workspace)
        return _after_launch(remote, launched, arguments)


def same_version(remote: Remote) -> None:
    """Refuses to start jobs with another version of us than this side."""
    from remote.setup import skew

    facts = remote.call("probe", venv=remote.host.entry.venv)
    problem = skew(facts["installed"])
    if problem and not os.path.isabs(remote.host.entry.venv):  # a venv of the user's own is his to keep
        raise SurgvqaError(f"{remote.host.name}: {problem} {remote.host.name}")


def _after_launch(remote: Remote, launched: dict[str, Any], arguments: argparse.Namespace) -> Outcome:
    if launched["warning"]:
        say(f"surgvqa-remote: warning: {launched['warning']}")
    if arguments.follow or arguments.wait:
        return _watch(remote, launched["run"], quiet=arguments.wait, log=False)
    return Outcome(launched, show=lambda console: console.print(plain(launched["run"])))


def _watch(remote: Remote, run: str, quiet: bool, log: bool) -> Outcome:
    """Draws a run's events until it ends; Ctrl-C leaves the run alone."""
    from remote.cloud.meter import Meter, record_of
    from remote.jobs.run_events import RunEvents

    view, events = JobView(), RunEvents(remote, run, patience=remote.patience)
    record = record_of(remote.host.name, remote.host.entry)
    meter, said = Meter(remote.host.entry.price_per_hour, record.asked if record else None), time.monotonic()
    try:
        for event in events:
            kind = event["kind"]
            meter.see(event)
            if meter.price_per_hour and not quiet and time.monotonic() - said > COST_EVERY_S:
                said = time.monotonic()
                view.console.print(f"  {meter.line(time.time())}", markup=False)
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
    finished = events.outcome.get("finished") or {}
    data = {"run": events.run, "state": events.state, **(finished.get("result") or {})}
    data |= {"cost": meter.figures(time.time())["cost"]} if meter.price_per_hour else {}
    good = events.state in ("finished", "stopped") and not finished.get("exit_code")
    return Outcome(data, ok=good, show=lambda console: console.print(plain(f"{events.run}: {events.state}")))


def runs(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """The runs on the host."""
    with connect_to(arguments, workspace) as remote:
        data = remote.call("runs")

    def show(console: Console) -> None:
        table = Table("run", "command", "state", "started", "steps", "name", box=None)
        table.columns[0].no_wrap = table.columns[3].no_wrap = True  # the id is there to be copied
        for r in data["runs"]:
            ago = human_seconds(max(0, data["time"] - r["started"]))  # the host's clock, whatever ours says
            table.add_row(*map(plain, (r["id"], r["command"], r["state"], f"{ago} ago", r["steps"] or "", r["name"])))
        console.print(table if data["runs"] else plain(f"no runs on {arguments.host}"))

    return Outcome({"runs": data["runs"]}, show=show)


def follow(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Follows a run on the host until it ends; of several hosts, the first one has all of it."""
    with connect_to_all(arguments, workspace) as remotes:
        return _watch(remotes[0], arguments.run, quiet=arguments.json, log=arguments.log)


def stop(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Ends a run on the host."""
    from remote.jobs import launch as jobs
    from remote.jobs import nodes

    with connect_to_all(arguments, workspace) as remotes:
        if len(remotes) > 1:
            data = nodes.stop(remotes, arguments.run, arguments.grace)
        else:
            data = jobs.stop(remotes[0], arguments.run, arguments.grace)
    was = "" if data["before"] in ("running", "starting") else " (it was not running)"
    text = f"{data['run']}: {data['state']}{was or ' after ' + human_seconds(data['seconds'])}"
    return Outcome(data, show=lambda console: console.print(plain(text)))


def fetch(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Brings a run's files here."""
    from remote.jobs import nodes
    from remote.jobs.fetch import fetch_run

    root = Path(arguments.to or workspace.runs_dir)
    with connect_to_all(arguments, workspace) as remotes, TerminalReporter() as terminal:
        if len(remotes) > 1:
            data = nodes.fetch(remotes, arguments.run, root, terminal, arguments.all, arguments.patience_s)
        else:
            data = fetch_run(remotes[0], arguments.run, root, terminal, arguments.all, arguments.patience_s)
    text = f"{', '.join(data['folders'])}: {data['files']} files, verified"
    return Outcome(data, show=lambda console: console.print(plain(text)))


def gpus(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """The GPUs of the host."""
    from surgvqa.machine.gpus import draw

    watch = arguments.watch
    if watch is not None and not 0.05 <= watch <= 3600:
        raise UsageError(f"--watch {watch:g}: expected seconds between 0.05 and 3600")
    with connect_to_all(arguments, workspace) as remotes:
        if len(remotes) > 1:
            return _gpus_of_all(remotes, watch)
        remote = remotes[0]
        venv = remote.host.entry.venv
        if watch is None:
            data = remote.call("gpus", venv=venv, watch=None)
            return Outcome(data, show=lambda console: console.print(draw(data["gpus"], data.get("note"))))
        console = terminal()

        def watch_them() -> None:
            for sample in remote.stream("gpus", venv=venv, watch=watch):
                remote.patience.answered()
                if arguments.json:
                    print(json.dumps(sample), flush=True)
                else:
                    console.print(draw(sample["gpus"], sample.get("note")))

        with suppress(KeyboardInterrupt):
            remote.patiently(watch_them)
        return Outcome({"gpus": []})


def _gpus_of_all(remotes: list[Remote], watch: float | None) -> Outcome:
    """The GPUs of several hosts, each with the name of its host."""
    from surgvqa.machine.gpus import draw

    if watch is not None:
        raise UsageError("--watch: of one host")
    with ThreadPoolExecutor(len(remotes)) as pool:
        answers = list(pool.map(lambda r: r.call("gpus", venv=r.host.entry.venv, watch=None), remotes))
    named = [(remote.host.name, answer) for remote, answer in zip(remotes, answers)]

    def show(console: Console) -> None:
        for name, answer in named:
            console.print(plain(name))
            console.print(draw(answer["gpus"], answer.get("note")))

    return Outcome({"gpus": [{**gpu, "host": name} for name, answer in named for gpu in answer["gpus"]],
                    "notes": {name: answer.get("note") for name, answer in named}}, show=show)  # fmt: skip
