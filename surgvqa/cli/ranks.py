"""`surgvqa train` on several GPUs: a process for each, started by torchrun.

`surgvqa train --gpus 2` starts torchrun's agent in this process, and a signal goes to rank 0, which has the run; or
torchrun is started by hand: `torchrun --nproc_per_node=2 -m surgvqa train …`. On several machines each has such a
process, which `surgvqa-remote launch` starts (remote/jobs/nodes.py).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from surgvqa.cli.jobs import record_failure, run_job
from surgvqa.config.options import TrainOptions
from surgvqa.config.settings import Path_, settings_of
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError, UsageError, first_line
from surgvqa.machine import gpu
from surgvqa.machine.process import usable_cores
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run, new_run_id
from surgvqa.runs.ranks import Nodes, node_run, nodes_asked, rank_and_count
from surgvqa.runs.state import read_run_json

Work = Callable[[Run], Outcome]
ALL = "all"
PROGRAM = ("-m", "surgvqa")
"""What torchrun's Python runs."""
MEET_S = 300
"""How long the first machine waits for the others."""


def require_one(command: str) -> None:
    """UsageError for a command that torchrun has started and that one process does alone."""
    if command != "train" and rank_and_count()[1] > 1:
        raise UsageError(f"torchrun starts {command} several times over; only train shares its work among processes")


def is_other() -> bool:
    """Whether this is another rank than 0."""
    return rank_and_count()[0] > 0


def see_own_card() -> None:
    """Of the cards of this machine a rank sees its own alone, as cuda:0.

    The key of torch.compile's cache has the number of the device, so what one rank has compiled serves all of them only
    if each calls its card by the same number.
    """
    rank, count = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = chosen.split(",") if chosen is not None else [str(number) for number in range(len(gpu.sample_devices()))]
    if 1 < count <= len(there) == _visible_gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = there[rank].strip()


def of_training(options: TrainOptions, arguments: argparse.Namespace, argv: list[str], workspace: Workspace) -> int:
    """How many processes train together. Ends this process where it only starts them."""
    _, count = rank_and_count()
    nodes = nodes_asked()
    if count == 1 and ((count := how_many(options)) > 1 or nodes) and not arguments.detach:
        raise SystemExit(start(argv, count, workspace, arguments.run_id, nodes))
    options.gpus = str(count)
    return count


def how_many(options: Any) -> int:
    """Processes that `--gpus` asks for: one a GPU, or with --device cpu none. UsageError for more than there are."""
    text = options.gpus.strip().lower()
    if text != ALL and not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"gpus is {options.gpus!r}; expected a number of GPUs, or all")
    if text == "1" or options.device == "cpu":
        return 1 if text == ALL else int(text)
    there = _visible_gpus()
    if text == ALL:
        return there or 1
    if int(text) > there:
        raise UsageError(f"gpus is {text}, and {there or 'none'} can be seen here; surgvqa gpus lists them")
    return int(text)


def _visible_gpus() -> int:
    """Whole cards that work: instances of one (MIG) cannot train together."""
    whole = [card for card in gpu.sample_devices() if card.get("state", "ok") == "ok" and "mig_index" not in card]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(whole)
    return min(len(whole), len([one for one in chosen.split(",") if one.strip() not in ("", "-1")]))


def together(work: Work, options: TrainOptions) -> Work:
    """`work` of rank 0: it tells the others the run folder and the options first."""

    def found(run: Run) -> Outcome:
        from surgvqa.machine.ranks import join

        ranks = run.ranks = join(*_patience(options))
        if ranks.hosts:
            run.emit("ranks", hosts=ranks.hosts)
        if ranks.heartbeat:
            ranks.heartbeat.emit = run.emit
        ranks.share({"run": str(run.folder.absolute()), "cwd": os.getcwd(), "options": vars(options)}, "run")
        return work(run)

    return found


def other_rank(room: str, arguments: argparse.Namespace, argv: list[str], workspace: Workspace) -> int:
    """Another rank than 0: it works in rank 0's run with rank 0's options and says nothing of its own; the exit code.

    On another machine it has a run folder there, and what lies in rank 0's workspace it has in its own.
    """
    from surgvqa.machine.ranks import RunOfRank, join

    ranks = join()
    told = ranks.share(None, "run")[0]
    options = TrainOptions(**told["options"])
    ranks.patience_s = _patience(options)[0] if _patience(options) else ranks.patience_s
    folder = Path(told["run"])
    if ranks.node:
        _bring_here(options, told["cwd"])
        run_id = arguments.run_id or node_run(folder.name, ranks.node)
        folder = workspace.runs_dir / run_id
        if ranks.leads:
            recorded = {name: {"value": value, "from": "rank 0"} for name, value in told["options"].items()}
            Run.create(workspace.runs_dir, "train", run_id=run_id, options=recorded, argv=argv)
        folder.mkdir(parents=True, exist_ok=True)
    work = importlib.import_module(room).run
    try:
        run_job(RunOfRank(folder, ranks, workspace.root), partial(work, options), f"log-rank-{ranks.rank}.txt")
    except (SurgvqaError, KeyboardInterrupt):  # rank 0 says it, or has been told
        return 1
    return 0


def _bring_here(options: TrainOptions, cwd: str) -> None:
    """Absolute paths in rank 0's folder `cwd` become those in ours."""
    for name, setting in settings_of(TrainOptions).items():
        value = getattr(options, name)
        if setting.type is Path_ and value and Path(value).is_relative_to(cwd):
            setattr(options, name, Path_(Path.cwd() / Path(value).relative_to(cwd)))


def _patience(options: TrainOptions) -> tuple[float, ...]:
    """--ddp_timeout, where it is given (training checks it)."""
    timeout = options.extra.get("ddp_timeout", "")
    return (float(timeout),) if timeout.isdecimal() else ()


def start(argv: list[str], count: int, workspace: Workspace, run_id: str | None, nodes: Nodes | None = None) -> int:
    """Starts `count` processes of `surgvqa ARGV` with torchrun's agent, and waits for them; rank 0's exit code, or
    that of the first one here. SurgvqaError when the other machines (`nodes`) do not come."""
    run_id = run_id or new_run_id("train")
    if "--run_id" not in argv:
        argv = [*argv, "--run_id", run_id]
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # of torchrun: rank 0 says what has happened
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
    ended: list[int | Exception] = []
    # Not in the main thread: there the agent would take the signals, and end all ranks at once.
    agent = threading.Thread(target=lambda: ended.append(_ended(argv, count, nodes)), daemon=True)
    folder = workspace.runs_dir / run_id

    def stop(*_: object) -> None:
        if not _stop(folder):  # the others have not come yet
            ended.append(1)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    agent.start()
    while agent.is_alive() and not ended:
        agent.join(0.5)
    found = ended[0] if ended else 1
    if isinstance(found, SurgvqaError):
        record_failure(argv, found)  # where no rank has
    if isinstance(found, Exception):
        raise found
    return found


def _ended(argv: list[str], count: int, nodes: Nodes | None) -> int | Exception:
    """How the ranks of this machine ended: an exit code, or the error of torchrun itself."""
    try:
        return _wait_for(argv, count, nodes)
    except Exception as error:
        if nodes and not isinstance(error, SurgvqaError):
            where = f"{nodes.endpoint}, within {MEET_S} s" if nodes.node == 0 else nodes.endpoint
            return SurgvqaError(f"the {nodes.count} hosts have not met at {where}: {first_line(error)}")
        return error


def _wait_for(argv: list[str], count: int, nodes: Nodes | None) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch").setLevel(logging.CRITICAL)
    # On several machines "static": "c10d" would number them by their addresses, and rank 0 has to be where the run
    # folder is. Both meet in a TCPStore of c10d.
    config = LaunchConfig(
        min_nodes=nodes.count if nodes else 1,
        max_nodes=nodes.count if nodes else 1,
        nproc_per_node=count,
        run_id=nodes.id if nodes else uuid.uuid4().hex,
        rdzv_backend="static" if nodes else "c10d",
        rdzv_endpoint=nodes.endpoint if nodes else "localhost:0",
        rdzv_configs={"rank": nodes.node, "timeout": MEET_S} if nodes else {},
        local_addr=None if nodes else "localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*PROGRAM, *argv)
    except ChildFailedError as error:
        if nodes:
            _name_failed(error.failures, nodes.endpoint)
        first = error.failures.get(nodes.node * count if nodes else 0)
        if first and first.exitcode > 0:  # it has said why
            return int(first.exitcode)
        return _killed_first(dict(error.failures)) if first else 1
    return 0


def _killed_first(failures: dict[int, Any]) -> int:
    """Of the ranks that failed here none could say why: raises SurgvqaError for the one that was killed first. SIGTERM
    is torchrun's, to those that were left."""
    rank = min(failures, key=lambda r: (failures[r].exitcode == -signal.SIGTERM, failures[r].timestamp))
    if failures[rank].exitcode < 0:
        raise SurgvqaError(f"rank {rank} {_killed(failures[rank].exitcode)}")
    return 1


def _killed(exitcode: int) -> str:
    hint = "; out of host memory?" if exitcode == -signal.SIGKILL else ""
    return f"was killed ({signal.Signals(-exitcode).name}{hint})"


def _name_failed(failures: dict[int, Any], endpoint: str) -> None:
    """Tells the ranks of the other machines which ones were killed here, which these could not say themselves."""
    from torch.distributed import TCPStore

    from surgvqa.machine.ranks import common

    host, _, port = endpoint.rpartition(":")
    with contextlib.suppress(RuntimeError):
        store = common(TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=5)))
        for rank, failure in failures.items():
            killed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM  # which is torchrun's own
            if killed and not store.check([f"failed {rank}"]):
                store.set(f"failed {rank}", _killed(failure.exitcode))


def _stop(folder: Path) -> bool:
    """Rank 0 tells the others, or on another machine the first rank there. Before there is one, or when it has been
    asked before, all end at once. False when there is nobody."""
    pid = read_run_json(folder).get("pid")
    children = psutil.Process().children(recursive=True)
    for child in children:
        if child.pid == pid or pid is None:
            child.terminate()
    return bool(children)
