"""The command line of `surgvqa-remote`: its options and its help."""

from __future__ import annotations

import argparse

from remote.upload.options import UploadOptions
from surgvqa import __version__
from surgvqa.cli.parser import Parser, add_option
from surgvqa.config.settings import settings_of
from surgvqa.runs.launch import STOP_GRACE_S

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
    "offers": "surgvqa-remote offers",
    "rented": "surgvqa-remote rented --json",
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
    "offers": "machines that can be rented now: price, memory, whether the training fits",
    "rented": "what is rented and what it has cost; fails when a machine runs that nobody here knows",
}
WITHOUT_HOST = ("hosts", "offers", "rented")
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
    for job in (setup, upload):
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
