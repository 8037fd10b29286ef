"""Every setting of every command, with its default, its unit and its reason: the single place where defaults stand.

A command's options are one dataclass here. `resolve` lays the sources over each other
(built-in default < preset < surgvqa.toml < command line) and remembers where each value came from.
"""

from __future__ import annotations

import difflib
import math
import os
import tomllib
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from surgvqa.errors import UsageError

WORKSPACE_FILE = "surgvqa.toml"
BUDGET_GB = 28.5  # the researcher's own ceiling on a 40 GB A100; GB = 1e9 bytes
LORA_TARGETS = r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
"""The author's LoraConfig.target_modules, in the checkpoint's own (old) key names."""


NONE = ("none", "None", "null", "")
"""Texts that stand for no value, where a setting may have none."""


class Path_(str):
    """A path option: relative to the workspace in surgvqa.toml, to the current folder on the command line."""


def option(default: Any = MISSING, help: str = "", choices: tuple[str, ...] | None = None, metavar: str | None = None):
    """A dataclass field that is also a command-line option and a key of surgvqa.toml."""
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar})


@dataclass(kw_only=True)
class MergeOptions:
    """LoRA adapters + base checkpoint -> one full BF16 checkpoint."""

    stage1_model_path: Path_ = option(help="Stage-1 checkpoint folder (audio-grafted Qwen2-VL)")
    stage2_adapter_path: Path_ = option(help="Stage-2 PEFT adapter folder")
    output_path: Path_ = option(Path_("./qwen2_audio_vl_merged_bf16"), "folder to write the merged checkpoint to")
    projector: Path_ | None = option(None, "an audio_projector.pt laid over the base before merging")
    max_shard_size: str = option("5GB", "largest size of one shard, e.g. 5GB or 800MB (GB = 1e9 bytes)")
    device: str = option("auto", "where the arithmetic runs", choices=("auto", "cpu", "cuda"))
    dry_run: bool = option(False, "show the plan, the sizes and the free disk, write nothing")


@dataclass(kw_only=True)
class AuditOptions:
    """Every tensor's dtype and shape against the index and the architecture, from the headers alone."""

    checkpoint: Path_ = option(help="checkpoint folder")
    deep: bool = option(False, "also read every weight and look for NaN and infinity")
    fix: Path_ | None = option(None, "write a BF16 copy to this folder")


@dataclass(kw_only=True)
class DataOptions:
    """How a sample is shown to the model; shared by train, evaluate, ask and budget."""

    num_frames: int = option(8, "frames shown of each sample, evenly spaced over its clip")
    image_size: int = option(512, "longest side of a frame in pixels; larger frames are scaled down")
    input_mode: str = option(
        "audio_only",
        "how the question reaches the model: spoken only, or spoken and written (the old script's way, which lets "
        "the model ignore the audio)",
        choices=("audio_only", "audio_text"),
    )


@dataclass(kw_only=True)
class CheckDataOptions:
    """Every line of the JSONL files against the frames and the audio."""

    files: list[Path_] = option(help="JSONL files of samples")
    frames_dir: Path_ = option(help="folder of frames: <frames_dir>/<video_id>/<frame>.jpg")
    audio_dir: Path_ = option(help="folder of spoken questions")
    eval_audio_dir: Path_ | None = option(None, "folder of the later files' spoken questions (default: audio_dir)")
    deep: bool = option(False, "also decode every frame and every spoken question")


@dataclass(kw_only=True)
class LoraOptions:
    """The adapter that is trained; the author's LoraConfig."""

    lora_r: int = option(64, "rank of the LoRA matrices")
    lora_alpha: int = option(16, "LoRA scale is alpha / r")
    lora_dropout: float = option(0.05, "dropout on the LoRA input, 0..1")
    lora_target_modules: str = option(LORA_TARGETS, "regular expression over the checkpoint's module names")


@dataclass(kw_only=True)
class CacheOptions:
    """The frozen encoders' outputs, kept on disk."""

    feature_cache: str = option(
        "auto",
        "encode every frame and question once and keep the result on disk: auto = where it fits, off = encode in every "
        "step",
        choices=("auto", "off"),
    )
    feature_cache_gb: float = option(60.0, "disk space that the feature cache may take, GB = 1e9 bytes")
    feature_cache_dir: Path_ | None = option(None, "folder of the feature cache (default: cache/ in the workspace)")


@dataclass(kw_only=True)
class TrainOptions(DataOptions, LoraOptions, CacheOptions):
    """LoRA training without quantisation. Any other field of transformers' TrainingArguments is accepted too."""

    model_name_or_path: Path_ = option(help="merged BF16 checkpoint folder")
    train_data_path: Path_ = option(help="JSONL file of training samples")
    eval_data_path: Path_ | None = option(None, "JSONL file of evaluation samples")
    frames_dir: Path_ = option(help="folder of frames: <frames_dir>/<video_id>/<frame>.jpg")
    audio_dir: Path_ = option(help="folder of spoken questions")
    eval_audio_dir: Path_ | None = option(None, "folder of spoken evaluation questions (default: audio_dir)")
    output_dir: Path_ | None = option(None, "folder for checkpoints (default: inside the run folder)")
    run_name: str | None = option(None, "name of the run in the run list and in W&B")

    budget_gb: float = option(BUDGET_GB, "GPU memory that the run may take, GB = 1e9 bytes")
    enforce_budget: bool = option(False, "cap the process at the budget, as if the card had no more")
    on_oom: str = option("step_down", "when CUDA runs out of memory", choices=("step_down", "fail"))
    resume: str | None = option(None, "run id (or its folder) to go on from its last checkpoint", metavar="RUN")

    per_device_train_batch_size: int = option(1, "samples a micro step")
    per_device_eval_batch_size: int = option(1, "samples an evaluation step")
    gradient_accumulation_steps: int = option(4, "micro steps an optimiser step")
    eval_accumulation_steps: int | None = option(None, "evaluation steps before results leave the GPU")
    learning_rate: float = option(2e-4, "peak learning rate")
    num_train_epochs: float = option(3.0, "passes over the training samples")
    max_steps: int = option(-1, "optimiser steps; overrides num_train_epochs when positive")
    warmup_ratio: float = option(0.0, "share of the steps over which the learning rate rises, 0..1")
    do_eval: bool = option(True, "evaluate during training when eval_data_path is given")
    eval_strategy: str = option("epoch", "when to evaluate", choices=("no", "steps", "epoch"))
    eval_steps: int | None = option(None, "optimiser steps between evaluations (eval_strategy=steps)")
    save_strategy: str = option("epoch", "when to save a checkpoint", choices=("no", "steps", "epoch", "best"))
    save_steps: int = option(50, "optimiser steps between checkpoints (save_strategy=steps)")
    save_total_limit: int | None = option(2, "checkpoints kept; the best one is always among them")
    load_best_model_at_end: bool = option(True, "end with the best checkpoint, not the last (needs evaluation)")
    metric_for_best_model: str = option("eval_loss", "what best means")
    greater_is_better: bool | None = option(None, "whether a larger metric is better (default: not for losses)")
    early_stopping_patience: int = option(0, "evaluations without improvement before stopping; 0 = never")
    bf16: bool = option(True, "train in bfloat16 (on a CPU: float32, bfloat16 is slower there)")
    logging_steps: int = option(1, "optimiser steps between logged losses")
    report_to: str = option("none", "wandb, none, or a comma-separated list of transformers' integrations")
    seed: int = option(42, "seed of shuffling, dropout and initialisation")
    gradient_checkpointing: bool = option(True, "recompute activations in the backward pass instead of keeping them")
    checkpointed_layers: int | None = option(
        None,
        "how many of the language model's layers recompute (default: on a GPU as few as fit the budget, on a CPU all; "
        "none without gradient_checkpointing)",
    )
    compile: str = option(
        "auto", "compile the language model's layers: auto = on a CUDA GPU", choices=("auto", "on", "off")
    )
    keep_activations: str = option(
        "auto",
        "what a compiled layer keeps for the backward pass: all, or only matrix products, which takes half the memory "
        "and costs little time; auto = all where it fits the budget, else products",
        choices=("auto", "all", "products"),
    )
    packing: str = option(
        "auto",
        "the samples of a micro step in one row, without padding between them: auto = with flash-attn, whose kernel "
        "keeps them apart for nothing; the others need a mask",
        choices=("auto", "on", "off"),
    )
    attn_implementation: str = option(
        "auto", "attention kernel", choices=("auto", "flash_attention_2", "sdpa", "eager")
    )
    optim: str = option("auto", "optimiser: auto = 8-bit AdamW where bitsandbytes has a GPU, else torch's AdamW")
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))


@dataclass(kw_only=True)
class EvaluateOptions(DataOptions, CacheOptions):
    """Greedy answers to every sample, scored by question type."""

    checkpoint: Path_ | None = option(None, "adapter folder, checkpoint folder, or run id")
    model_name_or_path: Path_ | None = option(
        None, "base checkpoint of an adapter (default: the one it was trained on)"
    )
    eval_data_path: Path_ | None = option(None, "JSONL file of samples")
    frames_dir: Path_ | None = option(None, "folder of frames: <frames_dir>/<video_id>/<frame>.jpg")
    audio_dir: Path_ | None = option(None, "folder of spoken questions")
    eval_audio_dir: Path_ | None = option(None, "folder of spoken evaluation questions (default: audio_dir)")
    predictions: Path_ | None = option(None, "score this predictions JSONL instead of running a model")
    batch_size: int | None = option(
        None, "samples generated together (default: 8, on a GPU as many of them as are predicted to fit the budget)"
    )
    max_new_tokens: int = option(32, "longest answer in tokens")
    budget_gb: float = option(BUDGET_GB, "GPU memory that the run may take, GB = 1e9 bytes")
    attn_implementation: str = option(
        "auto", "attention kernel", choices=("auto", "flash_attention_2", "sdpa", "eager")
    )
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))


@dataclass(kw_only=True)
class AskOptions(DataOptions):
    """One answer to one spoken question."""

    checkpoint: Path_ = option(help="adapter folder, checkpoint folder, or run id")
    model_name_or_path: Path_ | None = option(
        None, "base checkpoint of an adapter (default: the one it was trained on)"
    )
    frames: list[Path_] = option(help="the clip's frames, in order")
    audio: Path_ = option(help="the spoken question")
    question: str | None = option(None, "the question in writing, for input_mode audio_text")
    max_new_tokens: int = option(32, "longest answer in tokens")
    attn_implementation: str = option(
        "auto", "attention kernel", choices=("auto", "flash_attention_2", "sdpa", "eager")
    )
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))


@dataclass(kw_only=True)
class BudgetOptions(DataOptions, LoraOptions):
    """The memory table of a configuration; no weight is loaded."""

    model_name_or_path: Path_ | None = option(None, "checkpoint folder (default: the real model's sizes)")
    budget_gb: float = option(BUDGET_GB, "GPU memory that the run may take, GB = 1e9 bytes")
    per_device_train_batch_size: int = option(1, "samples a micro step")
    gradient_accumulation_steps: int = option(4, "micro steps an optimiser step")
    gradient_checkpointing: bool = option(True, "recompute activations in the backward pass instead of keeping them")
    checkpointed_layers: int | None = option(None, "how many of the language model's layers recompute (default: all)")
    compile: str = option("auto", "compiled layers keep less: auto = on", choices=("auto", "on", "off"))
    keep_activations: str = option(
        "auto", "what a compiled layer keeps: all, or only matrix products", choices=("auto", "all", "products")
    )
    feature_cache: str = option("auto", "auto = encoders off the GPU, off = run in every step", choices=("auto", "off"))
    optim: str = option("auto", "optimiser: auto = 8-bit AdamW")


@dataclass(kw_only=True)
class DemoOptions:
    """The embedded workspace: small model, small data, all real formats."""

    directory: Path_ = option(Path_("demo"), "folder to make the workspace in", metavar="DIR")
    run: bool = option(False, "go on headless: merge, audit, train, evaluate; print the report")
    demo_seed: int = option(0, "seed of the clips, the voices and the weights")


@dataclass(kw_only=True)
class HostOptions:
    """Where remote work goes; read by the panel and surgvqa-remote."""

    host: str | None = option(None, "default host: a name of ~/.ssh/config or hosts.toml")
    stage1_hub_id: str | None = option(
        None, "Stage 1 on the Hugging Face hub, USER/NAME or USER/NAME@REVISION, for hosts to get it themselves"
    )


# --- the fields of a dataclass, as the parser and the TOML reader need them -------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One field: its name, plain type, and what is known about it."""

    name: str
    type: type  # bool, int, float, str or Path_
    repeated: bool
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...] | None
    metavar: str | None

    @property
    def required(self) -> bool:
        return self.default is MISSING


def settings_of(options_class: type) -> dict[str, Setting]:
    """The settings of an options dataclass, by name, in order of declaration."""
    hints = typing.get_type_hints(options_class)
    found = {}
    for f in fields(options_class):
        hint, optional, repeated = hints[f.name], False, False
        if isinstance(hint, types.UnionType):
            optional = True
            hint = next(a for a in hint.__args__ if a is not type(None))
        if typing.get_origin(hint) is list:
            repeated, hint = True, hint.__args__[0]
        found[f.name] = Setting(
            f.name,
            hint,
            repeated,
            optional,
            f.default,
            f.metadata.get("help", ""),
            f.metadata.get("choices"),
            f.metadata.get("metavar"),
        )
    return found


def convert(setting: Setting, value: Any, where: str) -> Any:
    """`value` (text from the command line, or a TOML value) as the setting's type; UsageError names `where`."""

    def bad(expected: str) -> UsageError:
        return UsageError(f"{where}: {setting.name} is {value!r}, expected {expected}")

    if value is None or (setting.optional and value in NONE):
        if setting.optional:
            return None
        raise bad("a value")
    if setting.repeated and isinstance(value, list):
        return [convert(_single(setting), item, where) for item in value]
    if setting.type is bool:
        if isinstance(value, bool):
            return value
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in known:
            raise bad("true or false")
        return known[str(value).lower()]
    if isinstance(value, (bool, list, dict)):
        raise bad("one path" if setting.type is Path_ else f"one {setting.type.__name__}")
    if setting.type in (int, float):
        try:
            number = float(value)
            if not math.isfinite(number):
                raise ValueError
            if setting.type is float:
                return number
            if number != int(number):
                raise ValueError
            return int(number)
        except (ValueError, OverflowError):
            raise bad("a whole number" if setting.type is int else "a number") from None
    if setting.choices and str(value) not in setting.choices:
        raise bad("one of " + ", ".join(setting.choices))
    return Path_(os.path.expanduser(str(value))) if setting.type is Path_ else setting.type(value)


def _single(setting: Setting) -> Setting:
    return Setting(**{**setting.__dict__, "repeated": False})


# --- the workspace file ----------------------------------------------------------------------------------------------

COMMAND_OPTIONS: dict[str, type] = {
    "demo": DemoOptions,
    "merge": MergeOptions,
    "audit": AuditOptions,
    "check-data": CheckDataOptions,
    "budget": BudgetOptions,
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
    "ask": AskOptions,
    "host": HostOptions,
}


@dataclass
class Workspace:
    """A folder with (perhaps) a surgvqa.toml; runs, presets and relative paths of the file belong to it."""

    root: Path
    values: dict[str, Any]
    """Top-level keys: for every command that knows them."""
    by_command: dict[str, dict[str, Any]]
    """[train], [merge], …: for that command alone."""

    @property
    def runs_dir(self) -> Path:
        return self.root / "runs"

    @property
    def file(self) -> Path:
        return self.root / WORKSPACE_FILE

    @property
    def preset(self) -> str | None:
        return self.values.get("preset")

    def value(self, name: str, command: str | None = None) -> Any:
        """A key of surgvqa.toml (paths made absolute), or None. A budget is the budget of what [train] describes."""
        for table in (command, "train") if command == "budget" else (command,):
            if name in self.by_command.get(table or "", {}):
                return self.by_command[table][name]
        return self.values.get(name)


def find_workspace(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` with a surgvqa.toml; `start` itself when there is none."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / WORKSPACE_FILE).is_file():
            return folder
    return start


def load_workspace(root: Path) -> Workspace:
    """Reads `root`/surgvqa.toml when it is there. Unknown keys, wrong types and bad TOML are UsageErrors."""
    root = Path(root).resolve()
    file = root / WORKSPACE_FILE
    if not file.is_file():
        return Workspace(root, {}, {})
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not valid TOML: {error}") from None
    shared: dict[str, Setting] = {"preset": Setting("preset", str, False, False, None, "", None, None)}
    for options_class in COMMAND_OPTIONS.values():
        for name, setting in settings_of(options_class).items():
            shared.setdefault(name, setting)
    values, by_command = {}, {}
    for key, value in document.items():
        if isinstance(value, dict):
            if key not in COMMAND_OPTIONS:
                raise UsageError(f"{file}: unknown table [{key}]; known tables: {', '.join(COMMAND_OPTIONS)}")
            known = settings_of(COMMAND_OPTIONS[key])
            by_command[key] = {k: _file_value(known, k, v, file, f"[{key}] ") for k, v in value.items()}
        else:
            values[key] = _file_value(shared, key, value, file, "")
    return Workspace(root, values, by_command)


def _file_value(known: dict[str, Setting], key: str, value: Any, file: Path, table: str) -> Any:
    if key not in known:
        raise UsageError(f"{file}: unknown key {table}{key}{nearest(key, known)}")
    value = convert(known[key], value, str(file))
    if known[key].type is Path_ and value is not None:
        absolute = [Path_(file.parent / v) for v in (value if isinstance(value, list) else [value])]
        value = absolute if isinstance(value, list) else absolute[0]
    return value


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean x?` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


# --- laying the sources over each other ------------------------------------------------------------------------------


@dataclass
class Resolved:
    """The options of one command as they will be used."""

    options: Any
    """An instance of the command's dataclass."""
    sources: dict[str, str]
    """Where each value came from: default, preset NAME, surgvqa.toml, command line."""
    preset: str | None
    extra: dict[str, str]
    """Options that are not ours: further TrainingArguments fields, as text."""

    def record(self) -> dict[str, dict[str, Any]]:
        """{setting: {value, from}} for run.json."""
        listed = {name: {"value": getattr(self.options, name), "from": source} for name, source in self.sources.items()}
        listed.update({name: {"value": value, "from": "command line"} for name, value in self.extra.items()})
        return listed


@dataclass(frozen=True)
class Inherited:
    """What a resumed run, or an adapter that is evaluated, was trained with."""

    values: dict[str, Any]
    origin: str
    """For run.json: where the values came from."""
    preset: str | None = None
    extra: dict[str, str] = field(default_factory=dict)


def resolve(
    command: str,
    given: dict[str, Any],
    workspace: Workspace,
    preset: str | None = None,
    extra: dict[str, str] | None = None,
    inherited: Inherited | None = None,
) -> Resolved:
    """Default < preset < surgvqa.toml < command line (`given`: converted values of the options that were named).

    `inherited` values stand between surgvqa.toml and what was named: a preset named with them is above them.
    Raises UsageError for an unknown preset and for a required option that no source names.
    """
    from presets import PresetError, load_presets

    inherited = inherited or Inherited({}, "")
    options_class = COMMAND_OPTIONS[command]
    known = settings_of(options_class)
    values = {name: s.default for name, s in known.items() if not s.required}
    sources = dict.fromkeys(values, "default")
    try:
        available = load_presets(workspace.root)
    except PresetError as error:
        raise UsageError(str(error)) from None
    takes_preset = any(name in known for name in settings_of(DataOptions))
    earlier = next((p.name for p in available if p.name == inherited.preset), None)
    name = preset or earlier or workspace.preset or (available[0].name if available else None)
    chosen = None
    if takes_preset and name:
        chosen = next((p for p in available if p.name == name), None)
        if chosen is None:
            where = "--preset" if preset else str(workspace.file)
            raise UsageError(
                f"{where}: no preset {name}{nearest(name, [p.name for p in available])} (surgvqa presets lists them)"
            )
        for key, value in chosen.settings.items():
            if key in known:
                values[key], sources[key] = convert(known[key], value, f"preset {name}"), f"preset {name}"
    for key in known:
        value = workspace.value(key, command)
        if command == "budget" and key == "model_name_or_path" and value and not Path(value).exists():
            value = workspace.value("stage1_model_path", "merge")  # not merged yet: the sizes are the same
        if value is not None:
            values[key], sources[key] = value, WORKSPACE_FILE
    for key, value in inherited.values.items():
        if key in known and not (preset and chosen and key in chosen.settings):
            values[key], sources[key] = convert(known[key], value, inherited.origin), inherited.origin
    for key, value in given.items():
        values[key], sources[key] = value, "command line"
    missing = [key for key in known if key not in values]
    if missing:
        raise UsageError(
            "missing " + ", ".join(f"--{key}" for key in missing) + f" (or the key of that name in {workspace.file})"
        )
    extra = {**inherited.extra, **(extra or {})}
    return Resolved(options_class(**values), sources, chosen.name if chosen else None, extra)
