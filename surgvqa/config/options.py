"""Every setting of every command, with its default, unit and reason. Defaults are defined here and nowhere else.

Each command's options are one dataclass. `resolve` combines the sources (built-in default < preset < surgvqa.toml <
command line) and records where each value came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from surgvqa.config.settings import Path_, option

BUDGET_GB = 28.5  # the researcher's own ceiling on a 40 GB A100; GB = 1e9 bytes
LORA_TARGETS = r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
"""The author's LoraConfig.target_modules, in the checkpoint's own (old) key names."""


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
    verify: int = option(
        0, "answer so many samples with base + adapter and with the merged checkpoint, and compare", least=0
    )
    eval_data_path: Path_ | None = option(None, "JSONL file of samples (verify)")
    frames_dir: Path_ | None = option(None, "folder of frames: <frames_dir>/<video_id>/<frame>.jpg (verify)")
    audio_dir: Path_ | None = option(None, "folder of spoken questions (verify)")
    eval_audio_dir: Path_ | None = option(None, "folder of spoken evaluation questions (default: audio_dir)")


@dataclass(kw_only=True)
class AuditOptions:
    """Every tensor's dtype and shape against the index and the architecture, from the headers alone."""

    checkpoint: Path_ = option(help="checkpoint folder")
    deep: bool = option(False, "also read every weight and look for NaN and infinity")
    fix: Path_ | None = option(None, "write a BF16 copy to this folder")


@dataclass(kw_only=True)
class DataOptions:
    """How a sample is shown to the model; shared by train, evaluate, ask and budget."""

    num_frames: int = option(8, "frames shown of each sample, evenly spaced over its clip", least=1)
    image_size: int = option(
        512,
        "longest side of a frame in pixels; larger frames are scaled down",
        least=28,
        old_names=("max_image_size",),
    )
    input_mode: str = option(
        "audio_only",
        "how the question reaches the model: spoken only, or spoken and written (as in the old script; it lets "
        "the model ignore the audio)",
        choices=("audio_only", "audio_text"),
    )


@dataclass(kw_only=True)
class CheckDataOptions:
    """Every line of the JSONL files against the frames and the audio."""

    files: list[Path_] = option(help="JSONL files of samples")
    frames_dir: Path_ | None = option(None, "folder of frames: <frames_dir>/<video_id>/<frame>.jpg")
    audio_dir: Path_ | None = option(None, "folder of spoken questions")
    eval_audio_dir: Path_ | None = option(None, "folder of the later files' spoken questions (default: audio_dir)")
    deep: bool = option(False, "also decode every frame and every spoken question")
    as_trained: Path_ | None = option(
        None, "what an old run heard and saw: its wandb-metadata.json, or its command line as a text file"
    )


@dataclass(kw_only=True)
class LoraOptions:
    """The adapter that is trained; the author's LoraConfig."""

    lora_r: int = option(64, "rank of the LoRA matrices", least=1)
    lora_alpha: int = option(16, "LoRA scale is alpha / r", least=1)
    lora_dropout: float = option(0.05, "dropout on the LoRA input, 0..1", least=0, below=1)
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
    feature_cache_gb: float = option(60.0, "disk space that the feature cache may take, GB = 1e9 bytes", least=0)
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

    budget_gb: float = option(BUDGET_GB, "GPU memory that the run may take, GB = 1e9 bytes", above=0)
    enforce_budget: bool = option(False, "cap the process at the budget, as if the card had no more")
    on_oom: str = option("step_down", "when CUDA runs out of memory", choices=("step_down", "fail"))
    resume: str | None = option(None, "run id (or its folder) to go on from its last checkpoint", metavar="RUN")

    per_device_train_batch_size: int = option(1, "samples a micro step", least=1)
    per_device_eval_batch_size: int = option(1, "samples an evaluation step", least=1)
    gradient_accumulation_steps: int = option(4, "micro steps an optimiser step", least=1)
    eval_accumulation_steps: int | None = option(None, "evaluation steps before results leave the GPU", least=1)
    learning_rate: float = option(2e-4, "peak learning rate", above=0)
    num_train_epochs: float = option(3.0, "passes over the training samples")
    max_steps: int = option(-1, "optimiser steps; overrides num_train_epochs when positive")
    warmup_ratio: float = option(0.0, "share of the steps over which the learning rate rises, 0..1", least=0, below=1)
    do_eval: bool = option(True, "evaluate during training when eval_data_path is given")
    eval_strategy: str = option("epoch", "when to evaluate", choices=("no", "steps", "epoch"))
    eval_steps: int | None = option(None, "optimiser steps between evaluations (eval_strategy=steps)", least=1)
    save_strategy: str = option("epoch", "when to save a checkpoint", choices=("no", "steps", "epoch", "best"))
    save_steps: int = option(50, "optimiser steps between checkpoints (save_strategy=steps)", least=1)
    save_total_limit: int | None = option(2, "checkpoints kept; the best one is always among them", least=1)
    load_best_model_at_end: bool = option(True, "end with the best checkpoint, not the last (needs evaluation)")
    metric_for_best_model: str = option("eval_loss", "what best means")
    greater_is_better: bool | None = option(None, "whether a larger metric is better (default: not for losses)")
    early_stopping_patience: int = option(0, "evaluations without improvement before stopping; 0 = never", least=0)
    bf16: bool = option(True, "train in bfloat16 (on a CPU: float32, bfloat16 is slower there)")
    logging_steps: int = option(1, "optimiser steps between logged losses", least=1)
    report_to: str = option("none", "wandb, none, or a comma-separated list of transformers' integrations")
    seed: int = option(42, "seed of shuffling, dropout and initialisation", least=0)
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
        "separates them at no cost; other kernels need a mask",
        choices=("auto", "on", "off"),
    )
    attn_implementation: str = option(
        "auto", "attention kernel", choices=("auto", "flash_attention_2", "sdpa", "eager")
    )
    optim: str = option("auto", "optimiser: auto = 8-bit AdamW where bitsandbytes has a GPU, else torch's AdamW")
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))

    extra: dict[str, str] = field(default_factory=dict)
    """Further fields of transformers' TrainingArguments, as they were typed."""


@dataclass(kw_only=True)
class EvaluateOptions(DataOptions, CacheOptions):
    """Greedy answers to every sample, scored by question type."""

    checkpoint: Path_ | None = option(
        None, "adapter folder, checkpoint folder, or run id", old_names=("checkpoint_path",)
    )
    model_name_or_path: Path_ | None = option(
        None, "base checkpoint of an adapter (default: the one it was trained on)"
    )
    eval_data_path: Path_ | None = option(None, "JSONL file of samples")
    frames_dir: Path_ | None = option(None, "folder of frames: <frames_dir>/<video_id>/<frame>.jpg")
    audio_dir: Path_ | None = option(None, "folder of spoken questions")
    eval_audio_dir: Path_ | None = option(None, "folder of spoken evaluation questions (default: audio_dir)")
    train_data_path: Path_ | None = option(None, "JSONL file of the training, whose majority is then scored as well")
    predictions: Path_ | None = option(
        None, "score this predictions JSONL instead of running a model; leaves no run folder"
    )
    output_file: Path_ | None = option(None, "write the predictions with their scores to this JSONL file as well")
    batch_size: int | None = option(
        None,
        "samples generated together (default: 8, on a GPU as many of them as are predicted to fit the budget)",
        least=1,
    )
    max_new_tokens: int = option(32, "longest answer in tokens", least=1)
    budget_gb: float = option(BUDGET_GB, "GPU memory that the run may take, GB = 1e9 bytes", above=0)
    attn_implementation: str = option(
        "auto", "attention kernel", choices=("auto", "flash_attention_2", "sdpa", "eager")
    )
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))


@dataclass(kw_only=True)
class ReportOptions:
    """One HTML page of scores, samples and answers; opens without a server and without a network."""

    files: list[str] | None = option(
        None, "runs of `evaluate`, files of predictions, files of samples", metavar="RUN|FILE"
    )
    eval_data_path: Path_ | None = option(None, "JSONL file of the samples (default: the run's own)")
    frames_dir: Path_ | None = option(None, "folder of frames: <frames_dir>/<video_id>/<frame>.jpg")
    audio_dir: Path_ | None = option(None, "folder of spoken questions")
    eval_audio_dir: Path_ | None = option(None, "folder of spoken evaluation questions (default: audio_dir)")
    output: Path_ = option(Path_("report.html"), "the page")
    title: str | None = option(None, "what stands at its top (default: the models' names)")
    max_mb: float = option(40.0, "largest page in MB (1e6 bytes); thumbnails shrink to fit", above=0)
    link: bool = option(False, "refer to frames and recordings by their path, embed none")
    limit: int | None = option(None, "show the first LIMIT samples only", least=1)


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
    max_new_tokens: int = option(32, "longest answer in tokens", least=1)
    attn_implementation: str = option(
        "auto", "attention kernel", choices=("auto", "flash_attention_2", "sdpa", "eager")
    )
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))


@dataclass(kw_only=True)
class BudgetOptions(DataOptions, LoraOptions):
    """The memory table of a configuration; no weight is loaded."""

    model_name_or_path: Path_ | None = option(None, "checkpoint folder (default: the real model's sizes)")
    budget_gb: float = option(BUDGET_GB, "GPU memory that the run may take, GB = 1e9 bytes", above=0)
    per_device_train_batch_size: int = option(1, "samples a micro step", least=1)
    gradient_accumulation_steps: int = option(4, "micro steps an optimiser step", least=1)
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
    demo_seed: int = option(0, "seed of the clips, the voices and the weights", least=0)


@dataclass(kw_only=True)
class HostOptions:
    """Where remote work goes; read by the panel and surgvqa-remote."""

    host: str | None = option(None, "default host: a name of ~/.ssh/config or hosts.toml")
    stage1_hub_id: str | None = option(
        None, "Stage 1 on the Hugging Face hub, USER/NAME or USER/NAME@REVISION, for hosts to get it themselves"
    )


COMMAND_OPTIONS: dict[str, type] = {
    "demo": DemoOptions,
    "merge": MergeOptions,
    "audit": AuditOptions,
    "check-data": CheckDataOptions,
    "budget": BudgetOptions,
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
    "ask": AskOptions,
    "report": ReportOptions,
    "host": HostOptions,
}
