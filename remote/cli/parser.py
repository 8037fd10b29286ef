"""The command line of `surgvqa-remote`: its options and its help."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from remote.cloud.steps import STEPS
from remote.ssh.patience import PATIENCE_HELP, PATIENCE_S
from remote.upload.options import UploadOptions
from surgvqa import __version__
from surgvqa.cli.completion import add_completion
from surgvqa.cli.parser import Parser, add_option
from surgvqa.config.settings import settings_of
from surgvqa.runs.process import STOP_GRACE_S

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
    "disk": "surgvqa-remote disk gpuhost --clean staging runs/20261127-081500-train-3f2a",
    "offers": "surgvqa-remote offers",
    "rented": "surgvqa-remote rented --json",
    "rent": "surgvqa-remote rent gpu_1x_a100 --name gpuhost --max_price 1.5 --setup --upload",
    "end": "surgvqa-remote end gpuhost",
    "export": "surgvqa-remote export --slurm --gpu a100 train --num_train_epochs 3",
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
    "disk": "what lies on the host's disk: sizes, ages, whose it is; remove what is ours, by name",
    "offers": "machines that can be rented now: price, memory, whether the training fits",
    "rented": "what is rented and what it has cost; fails when a machine runs that nobody here knows",
    "rent": "rent a machine and make it a host; it costs money until it is ended",
    "end": "fetch what is on a rented machine, verified, then terminate it",
    "export": "the job file that does the same through SkyPilot, dstack or Slurm",
}
ON_SEVERAL = ("launch", "resume", "follow", "stop", "fetch", "gpus")
WITHOUT_HOST = ("hosts", "offers", "rented", "rent", "end", "export")
OUR_VALUES = ("--workspace", "--patience_s", "--run_id", "--then", "--max_cost", "--max_hours", "--discard",
              "--end_from", "--results")  # fmt: skip
"""Options of ours that have a value, which `launch` accepts behind the command too."""
MORE_VALUES = {
    "rent": ("--name", "--region", "--wait", "--max_price", "--identity_file"),
    "export": ("--name", "--gpu", "--hours"),
}
BEFORE_JOB = {"launch": 2, "rent": 2, "export": 1}
"""Commands that a job follows, and how many words without a dash stand before it."""
LAUNCH_FLAGS = ("--json", "--follow", "--wait", "--share", "--accept_new_host_key", "--sync", "--detach")


def build_parser() -> Parser:
    parser = Parser(prog="surgvqa-remote", description="surgvqa on a GPU host, over SSH.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"surgvqa-remote {__version__}")
    add_completion(parser)
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
        sub.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
        sub.add_argument(
            "--workspace", metavar="DIR", default=None, help="workspace folder here (default: the nearest one)"
        )
        if name not in WITHOUT_HOST:
            sub.add_argument(
                "--accept_new_host_key",
                action="store_true",
                default=False,
                help="remember the key of a host that is not known yet (a changed key is refused always)",
            )
            if name != "upload":  # it has the same among its options
                patience = f"{PATIENCE_HELP} (default: {PATIENCE_S:g})"
                sub.add_argument(
                    "--patience_s", type=_amount("seconds"), default=PATIENCE_S, metavar="SECONDS", help=patience
                )
            several = "; HOST1,HOST2 for a training on both, and its GPUs" if name in ON_SEVERAL else ""
            sub.add_argument("host", metavar="HOST", help="a name of ~/.ssh/config or hosts.toml" + several)
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
    _then_options(subs["launch"])
    _export_options(subs["export"])
    _then_options(subs["rent"])
    subs["rent"].add_argument(
        "job", metavar="COMMAND …", nargs="*", help="then set it up, upload to it and launch this there: train …"
    )
    for job in (setup, upload, subs["launch"], subs["rent"], subs["end"]):
        job.add_argument(
            "--detach", action="store_true", default=False, help="go on in the background; print the run id and return"
        )
        job.add_argument("--run_id", default=None, help=argparse.SUPPRESS)
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
    disk = subs["disk"]
    disk.add_argument(
        "--clean",
        nargs="+",
        default=[],
        metavar="NAME",
        help="remove these of the list; staging: all interrupted uploads",
    )
    disk.add_argument("--yes", action="store_true", help="remove without asking")
    rent, end = subs["rent"], subs["end"]
    rent.add_argument(
        "type", metavar="TYPE", help="of `offers`; local: an sshd on this computer, to try it for nothing"
    )
    rent.add_argument("--name", help="the host's name (default: TYPE); rented once, however often it is asked for")
    rent.add_argument("--region", help="default: the first where one is free")
    rent.add_argument("--wait", type=_amount("seconds"), default=0.0, metavar="SECONDS", help="for one to become free")
    rent.add_argument("--max_price", type=_amount("dollars"), metavar="DOLLARS", help="an hour; refuse what costs more")
    rent.add_argument("--identity_file", metavar="FILE", help="private key to log in with; FILE.pub is given away")
    rent.add_argument("--setup", action="store_true", help="then set it up")
    rent.add_argument("--upload", action="store_true", help="then upload to it")
    end.add_argument("name", metavar="NAME", help="of `rented`")
    end.add_argument("--discard", nargs="+", default=[], metavar="RUN", help="runs to lose with it; all for everything")
    end.add_argument(
        "--forget", action="store_true", help="close the record of a machine that the provider knows no more"
    )
    subs["gpus"].add_argument("--watch", type=float, metavar="SECONDS", help="again every SECONDS until Ctrl-C")
    return parser


def _export_options(export: Parser) -> None:
    tool = export.add_mutually_exclusive_group(required=True)
    tool.add_argument("--skypilot", action="store_true", help="surgvqa-sky.yaml")
    tool.add_argument("--dstack", action="store_true", help="surgvqa.dstack.yml")
    tool.add_argument("--slurm", action="store_true", help="surgvqa-slurm.sh")
    export.add_argument("--name", default="surgvqa", help="of the job (default: surgvqa)")
    export.add_argument("--gpu", default="H100", help="as the tool names it (default: H100)")
    hours = "for the training, which then saves its state; a quarter more for the rest (default: 24)"
    export.add_argument("--hours", type=_amount("hours"), default=24.0, metavar="HOURS", help=hours)
    export.add_argument("job", metavar="COMMAND …", nargs="*", help="with its options (default: train, then evaluate)")


def _then_options(launch: Parser) -> None:
    """What follows a job on a rented machine."""
    add = launch.add_argument
    add("--then", type=_steps, metavar="STEPS", help="when it has ended, some of evaluate,fetch,terminate (rented)")
    add("--max_cost", type=_amount("dollars"), metavar="DOLLARS", help="of the rented machine; stops the job then")
    add("--max_hours", type=_amount("hours"), metavar="HOURS", help="since it was rented; stops the job then")
    add("--discard", type=lambda text: text.split(","), default=[], metavar="RUNS", help="may be lost with it: A,B")
    where = "who does what follows the job: this computer, or the machine itself (default: laptop)"
    add("--end_from", choices=("laptop", "host"), default="laptop", help=where)
    target = "of --end_from host: s3://BUCKET/PREFIX, USER@HOST:FOLDER (rsync), or a folder there that stays"
    add("--results", default="", metavar="TARGET", help=target)
    add("--sync", action="store_true", help="results come home as they are made")


def _amount(unit: str) -> Callable[[str], float]:
    """The type of an argument of `unit`, at least 0."""

    def amount(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected {unit}, at least 0")
        return value

    return amount


def _steps(text: str) -> list[str]:
    """An argument of --then: some of STEPS, in their order."""
    asked = [word.strip() for word in text.split(",")]
    if wrong := [word for word in asked if word not in STEPS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r}: expected some of {','.join(STEPS)}")
    if "terminate" in asked and "fetch" not in asked:
        raise argparse.ArgumentTypeError("terminate without fetch would lose what was made: fetch,terminate")
    return [step for step in STEPS if step in asked]


def split_job(argv: list[str]) -> tuple[list[str], list[str]]:
    """`launch [options] HOST [options] COMMAND …`: our words, and those of the command there; so with `rent`."""
    command = next((word for word in argv if not word.startswith("-")), "")
    with_value = OUR_VALUES + MORE_VALUES.get(command, ())
    values = {i + 1 for i, word in enumerate(argv) if word in with_value}
    plain = [i for i, word in enumerate(argv) if not word.startswith("-") and i not in values]
    if command not in BEFORE_JOB:
        return argv, []
    before = BEFORE_JOB[command]
    start = plain[before] if len(plain) > before else len(argv)
    ours, job, rest = argv[:start], [], argv[start:]
    while rest:  # `launch HOST train … --follow` is meant for us
        word = rest.pop(0)
        if word in with_value:
            ours += [word, *rest[:1]]
            del rest[:1]
        elif word in LAUNCH_FLAGS or word.partition("=")[0] in with_value:
            ours.append(word)
        else:
            job.append(word)
    return ours, job
