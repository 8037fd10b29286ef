"""`surgvqa-remote launch HOST … --then evaluate,fetch,terminate`: a job on a rented machine, and what follows it."""

from __future__ import annotations

import argparse
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from remote.agent import results
from remote.agent.protocol import IDLE_PERCENT, IDLE_S
from remote.cloud import host_entry
from remote.cloud.ledger import NAME, Ledger, Record
from remote.cloud.meter import Meter, cost_per_point
from remote.cloud.plan import Plan, Plans
from remote.cloud.provider import Provider, SystemClock
from remote.cloud.then import Ended, Guard, carry_out, evaluation_of
from remote.ssh.connection import Remote, connect
from remote.ssh.errors import SlowLogin, Unreachable
from remote.ssh.hosts import Host, resolve
from remote.ssh.patience import BACKOFF_S, Patience
from surgvqa.cli.jobs import run_job
from surgvqa.cli.main import say
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run
from surgvqa.runs.launch import launch as start_detached
from surgvqa.terminal.drawing import plain
from surgvqa.terminal.figures import human_seconds

SYNC_EVERY_S = 60.0
MONEY_EVERY_S = 30.0
PASSED_ON = ("phase", "progress", "metric", "eval", "checkpoint", "preset", "oom", "warning")
"""Kinds of events of the run there that are events of the run here too."""


def launch(arguments: argparse.Namespace, workspace: Workspace) -> Outcome:
    """Starts the job and does what follows it; goes on with what was begun when it is asked again."""
    ledger = Ledger()
    record = ledger.read(arguments.host) if NAME.fullmatch(arguments.host) else None
    done = Plans(ledger).of(record) if record and not record.open else None
    if record and done and not done.going and not arguments.job:
        return _outcome(done, record)
    if record is None or not (record.open or done):
        if arguments.job:
            raise UsageError(f"--then: {arguments.host} was not rented from here; see surgvqa-remote rented")
        raise UsageError("name the command to launch: surgvqa-remote launch HOST train …")
    if not record.open and arguments.job:
        raise UsageError(f"{arguments.host}: ended already; its bill: surgvqa-remote launch {arguments.host}")
    plan = _plan(arguments, workspace, Plans(ledger), record)
    if arguments.detach:
        words = [plan.name, "--workspace", str(workspace.root)]
        folder = start_detached("launch", words, Path.cwd(), workspace.runs_dir, module="remote")
        data = {"run": folder.name, "folder": str(folder), "then": plan.then}
        return Outcome(data, show=lambda console: console.print(plain(folder.name)))
    options = {name: {"value": value, "from": "command line"} for name, value in vars(arguments).items()}
    run = Run.create(workspace.runs_dir, "launch", run_id=arguments.run_id, options=options, workspace=workspace.root)
    try:
        return run_job(run, lambda run: _carry_out(plan, ledger, record, workspace, run))
    except BaseException:
        if plan.stage not in ("check", "launch"):
            price = f"${record.price_per_hour:.2f} an hour"
            bell = "\a" if sys.stderr.isatty() else ""
            say(f"surgvqa-remote: {bell}{plan.name} is NOT ENDED and costs {price}; go on: launch {plan.name}")
        raise


def refuse_without_then(arguments: argparse.Namespace) -> None:
    """UsageError for an option that nothing would follow."""
    for name in ("max_cost", "max_hours", "discard", "results", "sync"):
        if getattr(arguments, name) not in (None, [], "", False):
            raise UsageError(f"--{name}: needs --then, on a rented machine")
    if arguments.end_from != "laptop":
        raise UsageError("--end_from: needs --then, on a rented machine")


def _plan(arguments: argparse.Namespace, workspace: Workspace, plans: Plans, record: Record) -> Plan:
    """The plan that the command asks for, recorded; or the one that stands, when it asks for the same or for none."""
    from remote.jobs import launch as jobs

    name = arguments.host
    limits = {"max_cost": arguments.max_cost, "max_hours": arguments.max_hours, "discard": arguments.discard or None,
              "sync": arguments.sync or None}  # fmt: skip
    limits = {key: value for key, value in limits.items() if value is not None}
    with plans.lock.locked(name):
        standing = plans.of(record)
        if not arguments.job:
            if standing is None or not standing.going:
                raise UsageError(f"{name}: no job with --then is under way there; name the command to launch")
            if Path(standing.workspace) != workspace.root.absolute():
                raise UsageError(f"{name}: its results belong to another workspace: --workspace {standing.workspace}")
            asked = standing
        else:
            command, *argv = arguments.job
            jobs.check_command(command)
            if command != "train" and "evaluate" in arguments.then:
                raise UsageError(f"--then evaluate: follows train, not {command}")
            argv, needs = jobs.paths_for_host(command, argv, workspace)
            root = str(workspace.root.absolute())
            asked = Plan(name, record.label, root, [command, *argv], needs, arguments.then, secrets.token_hex(4),
                         share=arguments.share, end_from=arguments.end_from, results=arguments.results,
                         stage="check" if arguments.end_from == "host" else "launch")  # fmt: skip
            _check_end(asked, record)
            if standing and standing.going:
                if _asked_for(standing) != _asked_for(asked):
                    under_way = standing.run or " ".join(standing.job[:1])
                    raise UsageError(f"{name}: {under_way} is under way there; go on: surgvqa-remote launch {name}")
                asked = standing
        asked.__dict__.update(limits)
        plans.write(asked)
    return asked


def _asked_for(plan: Plan) -> tuple[object, ...]:
    return plan.job, plan.then, plan.workspace, plan.end_from, plan.results


def _check_end(plan: Plan, record: Record) -> None:
    if plan.end_from == "laptop":
        if plan.results:
            raise UsageError("--results: is for --end_from host; from here, results come here")
    elif record.provider != "lambda":
        raise UsageError(f"--end_from host: a {record.provider} machine cannot end itself")
    elif "terminate" not in plan.then or not plan.results:
        raise UsageError(f"--end_from host: needs --then …,fetch,terminate and --results TARGET; {results.FORMS}")
    else:
        results.kind_of(plan.results)


def _carry_out(plan: Plan, ledger: Ledger, record: Record, workspace: Workspace, run: Run) -> Outcome:
    from remote.cli import cloud

    if "terminate" in plan.then and record.price_per_hour and plan.end_from == "laptop":
        run.warning(
            f"{plan.name} is ended from here: while this computer sleeps or is off, it costs "
            f"${record.price_per_hour:.2f} an hour, and no limit holds; asked again, this command goes on"
        )
    plans, provider, clock = Plans(ledger), cloud.provider_of(record.provider), SystemClock()

    def on_host(guard: Guard) -> _OnHost:
        return _OnHost(plan, record, provider, workspace, guard, run)

    ended = carry_out(plan, plans, provider, ledger, clock, on_host, run)
    return _outcome(plan, ended)


def not_told(record: Record) -> Outcome | None:
    """The bill of a machine that has ended, when its plan was carried out and nobody was told."""
    plan = Plans(Ledger()).of(record)
    return _outcome(plan, record) if plan and not plan.going and not plan.told else None


def _outcome(plan: Plan, record: Record) -> Outcome:
    """The bill of a plan that is done. A machine that has ended is no host any more."""
    if not record.open:
        host_entry.remove(record)
    plan.told = plan.told or not plan.going
    Plans(Ledger()).write(plan)
    cost = record.cost(time.time())
    data: dict[str, Any] = {
        "run": plan.run,
        "state": plan.state,
        "evaluation": {"run": plan.evaluation, "state": plan.evaluation_state, **plan.scores},
        "fetched": plan.fetched,
        "ended": not record.open,
        "handed": plan.stage == "handed",
        "cut": plan.cut,
        "idle": plan.idle,
        "cost": round(cost, 2),
        "cost_per_point": cost_per_point(cost, plan.scores),
    }
    if plan.end_from == "host":
        where = f"its results go to {plan.results}; how it is: surgvqa-remote launch {plan.name}"
        text = f"{plan.name} {'has ended' if data['ended'] else 'ends itself when ' + plan.run + ' is over'}; {where}"
        return Outcome(data, show=lambda console: console.print(plain(text)))
    good = plan.state == "finished" and not plan.cut and not plan.idle
    good = good and ("evaluate" not in plan.then or plan.evaluation_state == "finished")
    return Outcome(data, ok=good, show=lambda console: console.print(plain(_bill(plan, data))))


def _bill(plan: Plan, data: dict[str, Any]) -> str:
    lines = [f"{plan.run}: {plan.state}" + (f" ({plan.cut})" if plan.cut else "")]
    if "evaluate" in plan.then:
        accuracy = plan.scores.get("keyword_accuracy")
        found = "" if accuracy is None else f", keyword accuracy {100 * accuracy:.1f} %"
        lines.append(f"{plan.evaluation or 'evaluation'}: {plan.evaluation_state}{found}")
    if plan.fetched:
        lines.append(f"here, verified: {', '.join(plan.fetched)}")
    state = "ended" if data["ended"] else "NOT ended"
    per_point = f", ${data['cost_per_point']:.2f} a point of accuracy" if data["cost_per_point"] else ""
    lines.append(f"{plan.name}: {state}; ${data['cost']:.2f} by our clock{per_point}; the provider's bill counts")
    if plan.idle:
        lines.append(f"{plan.name} was {plan.idle}, and cost money")
    return "\n".join(lines)


class _Untiring(Patience):
    """Waits for a rented machine as long as it costs money; `tell` ends the waiting when it does no more."""

    def __init__(self, tell: Callable[[str], None]):
        super().__init__(math.inf, tell)

    def next_pause_s(self, error: Unreachable) -> float:
        return float(BACKOFF_S[-1]) if isinstance(error, SlowLogin) else super().next_pause_s(error)


class _OnHost:
    """An `OnMachine` over SSH."""

    def __init__(self, plan: Plan, record: Record, provider: Provider, workspace: Workspace, guard: Guard, run: Run):
        self._record, self._provider = record, provider
        self._workspace, self._guard, self._run, self._sync = workspace, guard, run, plan.sync
        self._host = host_of(plan.name, plan.label, workspace)
        self._remote = Remote(self._host, _Untiring(guard.away))

    def launch(self, words: list[str], needs: list[str], token: str, share: bool) -> str:
        from remote.cli.commands import same_version
        from remote.jobs import launch as jobs

        same_version(self._remote)
        launched = jobs.launch(self._remote, words[0], words[1:], needs=needs, share=share, token=token)
        if launched["warning"]:
            self._run.warning(launched["warning"])
        return str(launched["run"])

    def _needs_there(self, plan: Plan) -> dict[str, Any]:
        """What the machine needs for its own end. The key and the access to S3 are secrets."""
        from remote.cloud.lambda_cloud import LambdaCloud

        assert isinstance(self._provider, LambdaCloud)  # `_plan` refuses others
        given = results.S3_VARIABLES if results.kind_of(plan.results) == "s3" else ()
        return {
            "target": plan.results,
            "given": {name: os.environ[name] for name in given if os.environ.get(name)},
            "machine_id": self._record.machine_id,
            **self._provider.for_the_machine(),
        }

    def check_end(self, plan: Plan) -> None:
        needs = self._needs_there(plan)
        secret = [name for name in needs["given"] if "KEY" in name or "TOKEN" in name]
        and_s3 = f", and {', '.join(secret)}," if secret else ""
        self._run.warning(
            f"the key of your account{and_s3} goes to {plan.name}, into the memory of one process; "
            "root there can read it"
        )
        if "AWS_SESSION_TOKEN" in needs["given"]:
            self._run.warning(
                "AWS_SESSION_TOKEN expires: if that happens before the results are copied, the machine is not ended"
            )
        self._remote.call("can_end", **needs)

    def hand_over(self, plan: Plan, limit_s: float | None) -> None:
        answer = self._remote.call(
            "end_from_here",
            venv=self._host.entry.venv,
            run=plan.run,
            evaluate=evaluation_of(plan) if "evaluate" in plan.then else [],
            token=f"{plan.token}e",
            limit_s=limit_s,
            **self._needs_there(plan),
        )
        if answer["warning"]:
            self._run.warning(answer["warning"])

    def handed(self) -> str:
        found = self._remote.call("ending")
        if not found.get("alive"):
            return "the process there that was to end it is gone; end it from here: surgvqa-remote end"
        if found.get("problem"):
            return f"{found.get('stage')}: {found['problem']}"
        idle_s = found.get("idle_s")
        if isinstance(idle_s, (int, float)) and idle_s >= IDLE_S:
            return f"idle for {human_seconds(idle_s)} after its job, at the step: {found.get('stage')}"
        return ""

    def gpu_works(self) -> bool:
        found = self._remote.call("gpus", venv=self._host.entry.venv, watch=None).get("gpus")
        busy = [row.get("utilization_percent") for row in found if isinstance(row, dict)] if found else [None]
        return any(not isinstance(one, (int, float)) or one >= IDLE_PERCENT for one in busy)

    def watch(self, run: str, guard: Guard) -> Ended:
        from remote.jobs import launch as jobs
        from remote.jobs.run_events import RunEvents

        stopping = False

        def beat() -> None:
            nonlocal stopping
            guard.tick()
            if not stopping and (reason := guard.reason()):
                stopping = True
                self._run.warning(f"{run} is stopped: {reason}")
                jobs.stop(self._remote, run)

        meter, said = Meter(self._record.price_per_hour, self._record.asked), 0.0
        sync = _Sync(self._host, self._workspace, run, self._run.warning) if self._sync else None
        events = RunEvents(self._remote, run, patience=self._remote.patience)
        self._remote.on_beat = beat
        try:
            for event in events:
                guard.see(event)
                meter.see(event)
                if time.monotonic() - said > MONEY_EVERY_S:
                    said = time.monotonic()
                    self._run.emit("money", **meter.figures(time.time()))
                if event["kind"] == "connection" and event["state"] == "unreachable":
                    guard.away(event["text"])
                elif event["kind"] in PASSED_ON:
                    self._run.emit(event["kind"], **{k: v for k, v in event.items() if k not in ("v", "t", "kind")})
                if sync:
                    sync.look(at_once=event["kind"] == "checkpoint")
        finally:
            self._remote.on_beat = lambda: None
            if sync:
                sync.close()
        finished = events.outcome.get("finished")
        finished = finished if isinstance(finished, dict) else {}
        result = finished.get("result")
        good = events.state == "finished" and not finished.get("exit_code")
        return Ended(events.state, good, result if isinstance(result, dict) else {})

    def going(self, discard: list[str]) -> list[str]:
        from remote.jobs.home import GOING, runs_there

        return [run for run, state in runs_there(self._remote) if state in GOING and run not in discard]

    def bring_home(self, discard: list[str], fetched: list[str]) -> list[str]:
        from remote.jobs.home import bring_home

        here, report = self._workspace.runs_dir, _Ticking(self._run, self._guard.tick)
        return bring_home(self._remote, here, report, set(discard), fetched, math.inf, self._guard.away)


class _Ticking:
    """The run as a reporter, by whose progress the guard looks now and then."""

    def __init__(self, run: Run, tick: Callable[[], None]):
        self._tick = tick
        self.emit, self.phase, self.warning, self._progress = run.emit, run.phase, run.warning, run.progress

    def progress(self, phase: str, done: float, total: float | None, unit: str, **fields: Any) -> None:
        self._tick()
        self._progress(phase, done, total, unit, **fields)


def host_of(name: str, label: str, workspace: Workspace) -> Host:
    """The host of a rented machine. SurgvqaError when hosts.toml names another one so, or none."""
    host = resolve(name, workspace.root)
    if host.entry.host_key_alias != label:
        raise SurgvqaError(
            f"{name}: NOT ENDED: hosts.toml does not have it; rent it again, or end it with --discard all"
        )
    return host


class _Sync:
    """Brings a run home while it is at work, in a thread of its own: one fetch at a time, and none waited for."""

    def __init__(self, host: Host, workspace: Workspace, run: str, warn: Callable[[str], None]):
        self._host, self._workspace, self._run, self._warn = host, workspace, run, warn
        self._thread: threading.Thread | None = None
        self._last = time.monotonic()

    def look(self, at_once: bool) -> None:
        """Fetches what is new, when it is time."""
        busy = self._thread is not None and self._thread.is_alive()
        if not busy and (at_once or time.monotonic() - self._last > SYNC_EVERY_S):
            self._last = time.monotonic()
            self._thread = threading.Thread(target=self._fetch, name="sync", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Waits for a fetch that is under way: the next one writes into the same files."""
        if self._thread:
            self._thread.join()

    def _fetch(self) -> None:
        from remote.jobs.fetch import fetch_run

        try:
            with connect(self._host, self._workspace.root) as remote:
                fetch_run(remote, self._run, self._workspace.runs_dir, _Silent(self._warn), patience_s=0.0)
        except (SurgvqaError, OSError) as error:
            with suppress(OSError):
                self._warn(f"{self._run} did not come home this time: {error}")


class _Silent:
    """A `Reporter` of warnings alone."""

    def __init__(self, warn: Callable[[str], None]):
        self._warn = warn

    def emit(self, kind: str, **fields: Any) -> None: ...

    def phase(self, name: str, text: str = "") -> None: ...

    def progress(self, phase: str, done: float, total: float | None, unit: str, **fields: Any) -> None: ...

    def warning(self, text: str) -> None:
        self._warn(text)
