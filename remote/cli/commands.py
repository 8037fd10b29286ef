"""`surgvqa-remote`: hosts, setup, upload, launch, resume, runs, follow, stop, fetch, gpus — over SSH, by one name each.

The command line's manners (JSON, exit codes, - or _) are surgvqa's own, from surgvqa/cli.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from remote.upload.options import UploadOptions
from surgvqa import __version__
from surgvqa.cli.main import Parser, add_option, forgive_encoding, normalise
from surgvqa.config.options import Workspace, convert, find_workspace, load_workspace, settings_of
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import STOP_GRACE_S, Run, finite, new_run_id
from surgvqa.terminal.job_view import JobView, human_seconds, terminal

EXAMPLES = {
    "hosts": "surgvqa-remote hosts --check",
    "setup": "surgvqa-remote setup gpuhost",
    "upload": "surgvqa-remote upload gpuhost --dry-run",
    "launch": "surgvqa-remote launch gpuhost --follow train --num_train_epochs 3",
    "resume": "surgvqa-remote resume gpuhost last",
    "runs": "surgvqa-remote runs gpuhost",
    "follow": "surgvqa-remote follow gpuhost last",
    "stop": "surgvqa-remote stop gpuhost last",
    "fetch": "surgvqa-remote fetch gpuhost last",
    "gpus": "surgvqa-remote gpus gpuhost --watch 1",
}
HELP = {
    "hosts": "the hosts that ssh and hosts.toml know",
    "setup": "make the workspace and the environment on a host, install surgvqa there",
    "upload": "send checkpoint and data: only what is missing, verified, resumable",
    "launch": "start a surgvqa command there as a job that outlives this connection",
    "resume": "go on with a run from its last checkpoint",
    "runs": "the runs on a host, whoever started them",
    "follow": "watch a run there until it ends, over lost connections",
    "stop": "end a run there: checkpoint, then a clean end",
    "fetch": "bring a run's adapters, checkpoints, predictions and logs home, verified",
    "gpus": "memory, utilisation, power and processes of the host's GPUs",
}


LAUNCH_FLAGS = ("--json", "--follow", "--wait", "--share", "--accept_new_host_key")


def build_parser() -> Parser:
    parser = Parser(prog="surgvqa-remote", description="surgvqa on a GPU host, over SSH.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"surgvqa-remote {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    subs = {}
    for name, text in HELP.items():
        sub = subs[name] = commands.add_parser(
            name,
            help=text,
            allow_abbrev=False,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {EXAMPLES[name]}",
            argument_default=argparse.SUPPRESS if name == "upload" else None,
        )
        sub.add_argument("--json", action="store_true", default=False, help="one JSON document on stdout")
        sub.add_argument(
            "--workspace", metavar="DIR", default=None, help="workspace folder here (default: the nearest one)"
        )
        if name != "hosts":
            sub.add_argument(
                "--accept_new_host_key",
                action="store_true",
                default=False,
                help="remember the key of a host that is not known yet (a changed key is refused always)",
            )
            sub.add_argument("host", metavar="HOST", help="a name of ~/.ssh/config or hosts.toml")
        if name in ("resume", "follow", "stop", "fetch"):
            sub.add_argument(
                "run", metavar="RUN", nargs="?", default="last", help="run id, its beginning, a run name, or last"
            )
    subs["hosts"].add_argument("--check", action="store_true", help="also connect to each")
    setup = subs["setup"]
    setup.add_argument("--extra", default="train", help="what to install with surgvqa; '' for nothing (default: train)")
    setup.add_argument("--system_site_packages", action="store_true", help="the venv sees the host's own packages")
    setup.add_argument("--flash_attn", action="store_true", help="also install flash-attn (may take a build)")
    setup.add_argument("--force", action="store_true", help="install again even when nothing changed")
    upload = subs["upload"]
    for setting in settings_of(UploadOptions).values():
        add_option(upload, setting, positional=False)
    upload.add_argument(
        "--detach", action="store_true", default=False, help="go on in the background; print the run id and return"
    )
    upload.add_argument("--run_id", default=None, help=argparse.SUPPRESS)
    for name in ("launch", "resume"):
        subs[name].add_argument("--share", action="store_true", help="start even when another job has the GPU")
        subs[name].add_argument("--follow", action="store_true", help="then watch it; Ctrl-C leaves it running")
        subs[name].add_argument("--wait", action="store_true", help="then wait in silence for its end")
    subs["launch"].add_argument(
        "job", metavar="COMMAND …", nargs="*", help="train, evaluate, merge, … with its options"
    )
    subs["stop"].add_argument("--grace", type=float, default=STOP_GRACE_S, metavar="SECONDS", help="before SIGKILL")
    subs["follow"].add_argument("--log", action="store_true", help="show the log too")
    subs["fetch"].add_argument("--to", metavar="DIR", help="where to (default: runs/ of the workspace here)")
    subs["fetch"].add_argument("--all", action="store_true", help="also optimiser states")
    subs["gpus"].add_argument("--watch", type=float, metavar="SECONDS", help="again every SECONDS until Ctrl-C")
    return parser


def split_job(argv: list[str]) -> tuple[list[str], list[str]]:
    """`launch [options] HOST [options] COMMAND …`: our own words, and those of the command there."""
    plain = [i for i, word in enumerate(argv) if not word.startswith("-") and argv[i - 1 : i] != ["--workspace"]]
    if not plain or argv[plain[0]] != "launch":
        return argv, []
    start = plain[2] if len(plain) > 2 else len(argv)
    ours, job, rest = argv[:start], [], argv[start:]
    while rest:  # `launch HOST train … --follow` is meant for us
        word = rest.pop(0)
        if word == "--workspace":
            ours += [word, *rest[:1]]
            del rest[:1]
        elif word in LAUNCH_FLAGS or word.startswith("--workspace="):
            ours.append(word)
        elif word != "--detach":  # as every job on a host is
            job.append(word)
    return ours, job


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 good, 1 it failed or the answer is bad, 2 it could not be asked."""
    argv = normalise(sys.argv[1:] if argv is None else argv)
    forgive_encoding()
    name = next((a for a in argv if not a.startswith("-")), "")
    try:
        argv, job = split_job(argv)
        arguments = build_parser().parse_args(argv)
        name = arguments.command
        if job:
            arguments.job = job
        root = arguments.workspace
        if root and not Path(root).is_dir():
            raise UsageError(f"--workspace {root}: no such folder")
        workspace = load_workspace(Path(root) if root else find_workspace())
        outcome = COMMANDS[name](arguments, workspace)
    except SurgvqaError as error:
        print(f"surgvqa-remote {name}".rstrip() + f": {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        after = "run it again to go on from here" if name in ("setup", "upload", "fetch") else "the host's jobs go on"
        print(f"surgvqa-remote {name}: stopped; {after}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:  # a disk here that is full, a folder that cannot be written
        print(f"surgvqa-remote {name}: {error.filename or 'here'}: {error.strerror or error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(finite(outcome.data), indent=1, default=str))
    elif outcome.show:
        outcome.show(terminal())
    return 0 if outcome.ok else 1


def _connect(arguments: argparse.Namespace, workspace: Workspace) -> Any:
    from remote.ssh.connection import connect

    return connect(arguments.host, workspace.root, arguments.accept_new_host_key)


def _hosts(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
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
            table.add_row(row["name"], reached, row["source"], price, row["gpus"] or "")
        console.print(table if listed else "no hosts: neither ~/.ssh/config nor hosts.toml names one")
        for row in listed if arguments.check else []:
            console.print(f"{row['name']}: {row.get('error') or row.get('skew') or 'ready'}", markup=False)

    return Outcome({"hosts": listed}, show=show)


def _as_job(
    command: str, arguments: argparse.Namespace, workspace: Workspace, work: Callable[[Run], Outcome]
) -> Outcome:
    """Runs `work` with a run folder here, drawn on the terminal.

    SIGTERM (the panel's stop) is met as Ctrl-C is: connections are closed, the run says "stopped".
    """
    stopping = False

    def terminate(*_: object) -> None:
        nonlocal stopping
        if not stopping:  # once is enough: what is open is being closed
            stopping = True
            raise KeyboardInterrupt

    recorded = {k: {"value": v, "from": "command line"} for k, v in vars(arguments).items() if k != "command"}
    previous = {number: signal.signal(number, terminate) for number in (signal.SIGTERM, signal.SIGINT)}
    run = Run.create(
        workspace.runs_dir, command, run_id=getattr(arguments, "run_id", None), options=recorded, argv=sys.argv[1:]
    )
    detached = os.environ.get("SURGVQA_DETACHED") == "1"
    view = JobView()
    run.observer = None if detached else view.show
    try:
        with run:
            try:
                outcome = work(run)
            except Exception:
                if stopping:  # a wait that was interrupted may fail on its way out
                    raise KeyboardInterrupt from None
                raise
            run.result = outcome.data
            run.exit_code = 0 if outcome.ok else 1
    finally:
        view.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return outcome


def _setup(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
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
        return Outcome(data, show=lambda console: console.print(text))

    return _as_job("setup", arguments, workspace, work)


def _upload(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    from remote.upload import command

    known = settings_of(UploadOptions)
    given = {k: convert(known[k], v, "command line") for k, v in vars(arguments).items() if k in known}
    options = UploadOptions(**given)
    command.check(options, workspace)
    if arguments.detach:
        return _detach(arguments, workspace)
    return _as_job(
        "upload",
        arguments,
        workspace,
        lambda run: command.upload(options, run, workspace, arguments.host, arguments.accept_new_host_key),
    )


def _detach(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """The same upload again, as a process of its own in a session of its own."""
    run_id = new_run_id("upload")
    folder = workspace.runs_dir / run_id
    folder.mkdir(parents=True)
    words = [w for w in normalise(sys.argv[1:]) if w not in ("--detach", "--json")]
    with open(folder / "log.txt", "ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "remote", *words, "--run_id", run_id],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "SURGVQA_DETACHED": "1"},
        )
    return Outcome({"run": run_id, "folder": str(folder)}, show=lambda console: console.print(run_id))


def _launch(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    from remote.jobs import launch

    if not arguments.job:
        raise UsageError("name the command to launch: surgvqa-remote launch HOST train …")
    command, *argv = arguments.job
    launch.check_command(command)
    argv, needs = launch.paths_for_host(command, argv, workspace)
    with _connect(arguments, workspace) as remote:
        _same_version(remote)
        launched = launch.launch(remote, command, argv, needs=needs, share=arguments.share)
        return _after_launch(remote, launched, arguments)


def _resume(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    from remote.jobs import launch

    with _connect(arguments, workspace) as remote:
        _same_version(remote)
        found = remote.call("runs", run=arguments.run, command="train")
        if found["state"] in ("running", "starting"):
            raise SurgvqaError(f"{arguments.host}: {found['id']} is {found['state']}; nothing to resume")
        command, *argv = found["run"].get("argv") or ["?"]
        if command != "train":
            raise UsageError(f"{found['id']}: a {command} run cannot be resumed, only train")
        launched = launch.launch(
            remote, "train", launch.resume_argv(argv, found["id"]), needs=[], share=arguments.share
        )
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
        print(f"surgvqa-remote: warning: {launched['warning']}", file=sys.stderr)
    if arguments.follow or arguments.wait:
        return _watch(remote, launched["run"], quiet=arguments.wait, log=False)
    return Outcome(launched, show=lambda console: console.print(launched["run"]))


def _watch(remote: Any, run: str, quiet: bool, log: bool) -> Outcome:
    """Draws a run's events until it ends; Ctrl-C leaves the run alone."""
    from remote.jobs.launch import Follower

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
                view.console.print(event["text"], end="", markup=False)
            elif kind == "error":
                view.console.print(f"error: {event.get('text')}", markup=False)
            elif kind not in ("log", "state"):
                view.show(event)
    finally:
        view.close()
    finished = follower.outcome.get("finished") or {}
    data = {"run": follower.run, "state": follower.state, **(finished.get("result") or {})}
    good = follower.state in ("finished", "stopped") and not finished.get("exit_code")
    return Outcome(data, ok=good, show=lambda console: console.print(f"{follower.run}: {follower.state}"))


def _runs(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    with _connect(arguments, workspace) as remote:
        data = remote.call("runs")

    def show(console: Console) -> None:
        table = Table("run", "command", "state", "started", "steps", "name", box=None)
        table.columns[0].no_wrap = table.columns[3].no_wrap = True  # the id is there to be copied
        for r in data["runs"]:
            ago = human_seconds(max(0, data["time"] - r["started"]))  # the host's clock, whatever ours says
            table.add_row(r["id"], r["command"], r["state"], f"{ago} ago", str(r["steps"] or ""), r["name"])
        console.print(table if data["runs"] else f"no runs on {arguments.host}")

    return Outcome({"runs": data["runs"]}, show=show)


def _follow(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    with _connect(arguments, workspace) as remote:
        return _watch(remote, arguments.run, quiet=arguments.json, log=arguments.log)


def _stop(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    from remote.jobs import launch

    with _connect(arguments, workspace) as remote:
        data = launch.stop(remote, arguments.run, arguments.grace)
    was = "" if data["before"] in ("running", "starting") else " (it was not running)"
    text = f"{data['run']}: {data['state']}{was or ' after ' + human_seconds(data['seconds'])}"
    return Outcome(data, show=lambda console: console.print(text))


def _fetch(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    from remote.jobs.fetch import fetch
    from remote.paths import inside

    with _connect(arguments, workspace) as remote:
        found = remote.call("runs", run=arguments.run)
        view = JobView()

        class Progress:
            """fetch's events go to the terminal alone: the folder belongs to the run that is fetched."""

            def phase(self, name: str, text: str = "") -> None:
                view.show({"kind": "phase", "name": name, "text": text})

            def progress(self, phase: str, done: float, total: float, unit: str, **_: Any) -> None:
                view.show({"kind": "progress", "phase": phase, "done": done, "total": total, "unit": unit})

            def warning(self, text: str) -> None:
                view.show({"kind": "warning", "text": text})

        root = Path(arguments.to or workspace.runs_dir)
        parts = []
        try:
            for folder in found["folders"]:
                target = root / (folder.removeprefix("runs/") if folder.startswith("runs/") else inside(folder))
                target.mkdir(parents=True, exist_ok=True)
                parts.append(fetch(remote, folder, target, Progress(), everything=arguments.all))
        finally:
            view.close()
    sums = {key: sum(part[key] for part in parts) for key in ("files", "bytes", "received_bytes", "seconds")}
    data = {"run": found["id"], "folder": parts[0]["folder"], "folders": [p["folder"] for p in parts], **sums}
    return Outcome(
        data, show=lambda console: console.print(f"{', '.join(data['folders'])}: {data['files']} files, verified")
    )


def _gpus(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
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


COMMANDS: dict[str, Callable[[argparse.Namespace, Workspace], Outcome]] = {
    "hosts": _hosts,
    "setup": _setup,
    "upload": _upload,
    "launch": _launch,
    "resume": _resume,
    "runs": _runs,
    "follow": _follow,
    "stop": _stop,
    "fetch": _fetch,
    "gpus": _gpus,
}

if __name__ == "__main__":
    sys.exit(main())
