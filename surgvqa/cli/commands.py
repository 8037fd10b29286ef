"""The table of commands: the purpose of each, its module, and how it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Command:
    """One row of the command table."""

    help: str
    example: str
    room: str
    """The module whose run() executes the command."""
    job: bool = False
    """Whether it has a run folder."""
    needs_train: bool = False
    """Whether it needs the packages of pip install 'surgvqa[train]'."""
    needs_torch: bool = False
    """Whether it needs only torch of those packages: pip install 'surgvqa[merge]'."""
    positional: tuple[str, ...] = ()
    extras: bool = False
    """Whether unknown options are passed on (TrainingArguments)."""
    arguments: Callable[[argparse.ArgumentParser], None] | None = field(default=None)
    """For commands without an options dataclass."""


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_name",
        metavar="RUN",
        nargs="?",
        default="last",
        help="run id, the beginning of one, a run name or folder (default: the newest)",
    )


def _gpus_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="again every SECONDS until Ctrl-C")


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "make the embedded workspace: small model, small data, all real formats",
        "surgvqa demo demo --run",
        "surgvqa.demo",
        needs_train=True,
        positional=("directory",),
    ),
    "merge": Command(
        "LoRA adapters + checkpoint -> one full BF16 checkpoint",
        "surgvqa merge --stage1_model_path stage1 --stage2_adapter_path stage2 --output_path merged",
        "surgvqa.evaluation.merge",
        needs_torch=True,
        job=True,
    ),
    "audit": Command(
        "dtypes, shapes and completeness of a checkpoint, from the headers alone",
        "surgvqa audit merged",
        "surgvqa.checkpoint.audit",
        positional=("checkpoint",),
    ),
    "check-data": Command(
        "every line of the JSONL files against the frames and the audio",
        "surgvqa check-data train.jsonl eval.jsonl --frames_dir frames --audio_dir audio",
        "surgvqa.data.check",
        positional=("files",),
    ),
    "split": Command(
        "samples into train, eval and test files by video, evenly by question type and label",
        "surgvqa split all.jsonl --eval_share 0.2 --output split",
        "surgvqa.prepare.split",
        positional=("files",),
    ),
    "speak": Command(
        "spoken questions in several wordings, voices, speeds and noise levels, some of them held out",
        "surgvqa speak train.jsonl --wordings wordings.toml --output spoken",
        "surgvqa.prepare.speak",
        positional=("file",),
    ),
    "budget": Command(
        "the memory table of a configuration, a row a component",
        "surgvqa budget --preset oom-6f-512px",
        "surgvqa.memory.budget",
    ),
    "train": Command(
        "LoRA training in BF16, inside the budget",
        "surgvqa train --model_name_or_path merged --train_data_path train.jsonl --frames_dir frames --audio_dir audio",
        "surgvqa.evaluation.train",
        needs_train=True,
        job=True,
        extras=True,
    ),
    "evaluate": Command(
        "greedy answers to every sample, scored by question type",
        "surgvqa evaluate --checkpoint last --eval_data_path eval.jsonl --frames_dir frames --audio_dir audio",
        "surgvqa.evaluation.command",
        needs_train=True,
        job=True,
    ),
    "compare": Command(
        "the same samples answered by several models: paired difference, interval, flips",
        "surgvqa compare before.jsonl after.jsonl --eval_data_path eval.jsonl",
        "surgvqa.evaluation.compare",
        positional=("files",),
    ),
    "probe": Command(
        "does the model listen and look: answers to altered sound and frames, compared",
        "surgvqa probe --checkpoint last --eval_data_path eval.jsonl --frames_dir frames --audio_dir audio",
        "surgvqa.probe.command",
        needs_train=True,
        job=True,
    ),
    "ask": Command(
        "one answer to one spoken question",
        "surgvqa ask --checkpoint merged --frames f1.jpg f2.jpg --audio question.wav",
        "surgvqa.evaluation.ask",
        needs_train=True,
    ),
    "report": Command(
        "one HTML page of scores, samples with frames and sound, and answers side by side",
        "surgvqa report last",
        "surgvqa.report.command",
        positional=("files",),
    ),
    "evidence": Command(
        "runs, scores, hashes, curves and a model card in one folder; --check reads it again",
        "surgvqa evidence TRAIN_RUN EVALUATE_RUN --output evidence",
        "surgvqa.evidence.command",
        positional=("runs",),
    ),
    "publish": Command(
        "an adapter or a checkpoint, with its card, to the Hugging Face hub",
        "surgvqa publish last --repo USER/NAME",
        "surgvqa.evidence.publish",
        positional=("source",),
    ),
    "presets": Command("the presets with their predicted peaks", "surgvqa presets", "surgvqa.memory.presets:presets"),
    "runs": Command("the runs of this workspace", "surgvqa runs", "surgvqa.runs.commands:runs"),
    "follow": Command(
        "watch a run until it ends", "surgvqa follow last", "surgvqa.runs.commands:follow", arguments=_run_argument
    ),
    "stop": Command(
        "end a run: checkpoint, then a clean end",
        "surgvqa stop last",
        "surgvqa.runs.commands:stop",
        arguments=_run_argument,
    ),
    "gpus": Command(
        "memory, utilisation, power and processes of the GPUs",
        "surgvqa gpus --watch 1",
        "surgvqa.machine.gpus",
        arguments=_gpus_arguments,
    ),
    "doctor": Command(
        "what this machine can do, and how to mend what it can't", "surgvqa doctor", "surgvqa.machine.doctor"
    ),
}
