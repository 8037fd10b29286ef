"""Every setting of every command, with its default, unit and reason.

Defaults are defined only here; those of `split` and `speak` are in `preparing`.

Each command's options are one dataclass. `resolve` combines the sources (built-in default < preset < surgvqa.toml <
command line) and records where each value came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from surgvqa.config.preparing import SpeakOptions, SplitOptions
from surgvqa.config.settings import Path_, option

BUDGET_GB = 28.5  # the limit that the researcher set on a 40 GB A100; GB = 1e9 bytes
LORA_TARGETS = r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
"""The author's LoraConfig.target_modules, in the checkpoint's own (old) key names."""

INPUT_MODES = ("audio_only", "audio_text", "text_only")


@dataclass(kw_only=True)
class MergeOptions:
    """Merges LoRA adapters and a base checkpoint into one full BF16 checkpoint."""

    stage1_model_path: Path_ = option(help="Stage-1 checkpoint folder (audio-grafted Qwen2-VL)")
    stage2_adapter_path: Path_ = option(help="Stage-2 PEFT adapter folder")
    output_path: Path_ = option(Path_("./qwen2_audio_vl_merged_bf16"), "folder to write the merged checkpoint to")
    projector: Path_ | None = option(None, "audio_projector.pt that replaces the base's projector before merging")
    max_shard_size: str = option("5GB", "largest size of one shard, e.g. 5GB or 800MB (GB = 1e9 bytes)")
    device: str = option("auto", "device that does the arithmetic", choices=("auto", "cpu", "cuda"))
    dry_run: bool = option(False, "show the plan, the sizes and the free disk space; write nothing")
    verify: int = option(
        0, "number of samples to answer with base + adapter and with the merged checkpoint, to compare them", least=0
    )
    eval_data_path: Path_ | None = option(None, "JSONL file of samples (verify)")
    frames_dir: Path_ | None = option(None, "folder of frames: <frames_dir>/<video_id>/<frame>.jpg (verify)")
    audio_dir: Path_ | None = option(None, "folder of spoken questions (verify)")
    eval_audio_dir: Path_ | None = option(None, "folder of spoken evaluation questions (default: audio_dir)")


@dataclass(kw_only=True)
class AuditOptions:
    """Checks every tensor's dtype and shape against the index and the architecture, reading only the headers."""

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
        "how the question reaches the model: spoken only; spoken and written (as in the old script; it lets the model "
        "ignore the audio); or written only",
        choices=INPUT_MODES,
    )
    audio_span: str = option(
        "full",
        "how much of the audio encoder's 30 s window reaches the language model: all of it, or the spoken part plus "
        "audio_margin_s (a third fewer tokens for a question of three seconds)",
        choices=("full", "spoken"),
    )
    audio_margin_s: float = option(0.5, "with audio_span spoken: seconds kept after the end of the question", least=0)


@dataclass(kw_only=True)
class BoxOptions:
    """Where the lesions are. This shows whether a sample's frames support its label."""

    boxes: Path_ | None = option(
        None,
        "lesion boxes: a folder of XML files in REAL-Colon's format, or a CSV file (frame, size, lesion, corners)",
    )
    drift: float = option(
        0.05,
        "smallest displacement of a lesion that counts as movement, as a share of the frame's width or height, 0..1",
        above=0,
        below=1,
    )


@dataclass(kw_only=True)
class CheckDataOptions(BoxOptions):
    """Checks every line of the JSONL files against the frames and the audio."""

    files: list[Path_] = option(help="JSONL files of samples")
    frames_dir: Path_ | None = option(None, "folder of frames: <frames_dir>/<video_id>/<frame>.jpg")
    audio_dir: Path_ | None = option(None, "folder of spoken questions")
    eval_audio_dir: Path_ | None = option(
        None, "folder of spoken questions for all files but the first (default: audio_dir)"
    )
    deep: bool = option(False, "also decode every frame and every spoken question")
    as_trained: Path_ | None = option(
        None, "also show what an old run heard and saw: its wandb-metadata.json, or its command line as a text file"
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
        "encode every frame and question once and keep the result on disk: auto = if it fits, off = encode every time",
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
    enforce_budget: bool = option(False, "limit the process to the budget, as if the card had no more memory")
    gpus: str = option("1", "GPUs of this machine that train together: a number, or all")
    shard: bool = option(False, "divide the language model among the GPUs, where it does not fit one (FSDP2)")
    on_oom: str = option("step_down", "when CUDA runs out of memory", choices=("step_down", "fail"))
    resume: str | None = option(None, "run (id or folder) to resume from its last saved state", metavar="RUN")

    per_device_train_batch_size: int = option(1, "samples per micro step", least=1)
    per_device_eval_batch_size: int = option(1, "samples per evaluation step", least=1)
    gradient_accumulation_steps: int = option(4, "micro steps per optimiser step", least=1)
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
    eval_generate: int = option(
        64, "evaluation samples that are also answered at each evaluation, for their label accuracy; 0 = none", least=0
    )
    metric_for_best_model: str = option("eval_loss", "what best means: eval_loss, label_accuracy, keyword_accuracy")
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
        "put the samples of a micro step into one row, without padding between them: auto = with flash-attn, whose "
        "kernel separates them at no cost; other kernels need a mask",
        choices=("auto", "on", "off"),
    )
    attn_implementation: str = option(
        "auto",
        "attention kernel: auto = of flash-attn and sdpa the one that is faster on this GPU, measured once",
        choices=("auto", "flash_attention_2", "sdpa", "eager"),
    )
    optim: str = option("auto", "optimiser: auto = 8-bit AdamW where bitsandbytes has a GPU, else torch's AdamW")
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))

    extra: dict[str, str] = field(default_factory=dict)
    """Further fields of transformers' TrainingArguments, as the user typed them."""


@dataclass(kw_only=True)
class AnswerOptions(DataOptions, CacheOptions):
    """A model and the samples that it answers; shared by evaluate and probe."""

    checkpoint: Path_ | None = option(
        None, "adapter folder, checkpoint folder, or run id", old_names=("checkpoint_path",)
    )
    model_name_or_path: Path_ | None = option(
        None, "base checkpoint of an adapter (default: the one it was trained on)"
    )
    force: bool = option(False, "ask with another input_mode or audio_span than the adapter was trained with")
    eval_data_path: Path_ | None = option(None, "JSONL file of samples")
    frames_dir: Path_ | None = option(None, "folder of frames: <frames_dir>/<video_id>/<frame>.jpg")
    audio_dir: Path_ | None = option(None, "folder of spoken questions")
    eval_audio_dir: Path_ | None = option(None, "folder of spoken evaluation questions (default: audio_dir)")
    batch_size: int | None = option(
        None,
        "samples generated together (default: 8; on a GPU as many as are predicted to fit the budget, at most 32)",
        least=1,
    )
    max_new_tokens: int = option(32, "longest answer in tokens", least=1)
    budget_gb: float = option(BUDGET_GB, "GPU memory that the run may take, GB = 1e9 bytes", above=0)
    attn_implementation: str = option(
        "auto", "attention kernel", choices=("auto", "flash_attention_2", "sdpa", "eager")
    )
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))


@dataclass(kw_only=True)
class CompareOptions:
    """Compares the predictions of two or more models for the same samples; each is compared with the first."""

    files: list[str] = option(help="files of predictions or runs of `evaluate`", metavar="RUN|FILE")
    metric: str = option("keyword", "accuracy to compare", choices=("keyword", "word", "label"))
    eval_data_path: Path_ | None = option(
        None, "JSONL file of the samples; their frames define the clusters (default: the run's own)"
    )
    reworded: bool = option(False, "the questions are worded differently: pair samples by id, type and label")
    detect: float | None = option(
        None, "say how many clusters it takes to detect a difference of POINTS", metavar="POINTS", above=0
    )


@dataclass(kw_only=True)
class EvaluateOptions(AnswerOptions, BoxOptions):
    """Answers every sample by greedy decoding and scores the answers by question type."""

    train_data_path: Path_ | None = option(
        None,
        "JSONL file of training samples, to score their majority label too and to tell known wordings from new ones",
    )
    text_scores: bool = option(
        False, "also compute BLEU-4, ROUGE-L and METEOR of the sentences (needs the extra text-scores)"
    )
    predictions: Path_ | None = option(
        None, "score this JSONL file of predictions instead of running a model; makes no run folder"
    )
    asr: Path_ | None = option(
        None,
        "folder of a Whisper checkpoint that recognises the spoken questions; the model is then asked in writing "
        "(input_mode text_only): the baseline that hears no audio",
    )
    output_file: Path_ | None = option(None, "also write the predictions with their scores to this JSONL file")
    resume: str | None = option(
        None, "an interrupted evaluation to continue with its options, keeping its answers", metavar="RUN"
    )
    answer_cache: str = option(
        "auto",
        "keep each answer under the hash of checkpoint, sample and settings, and reuse it",
        choices=("auto", "off"),
    )


PROBE_CONDITIONS = (
    "other_question",
    "other_text",
    "same_question",
    "silence",
    "noise",
    "speed",
    "other_wording",
    "shuffled",
    "first_frame",
    "black",
    "other_clip",
)


@dataclass(kw_only=True)
class ProbeOptions(AnswerOptions):
    """Answers altered samples, to show whether the model follows the spoken question and looks at the frames."""

    train_data_path: Path_ | None = option(
        None, "JSONL file of training samples, whose recordings (in audio_dir) give other wordings"
    )
    conditions: list[str] | None = option(
        None, "what to alter (default: all conditions that apply)", choices=PROBE_CONDITIONS
    )
    max_samples: int | None = option(None, "number of samples to probe, drawn evenly from the question types", least=2)
    probe_seed: int = option(0, "seed that decides what replaces what", least=0)
    resume: str | None = option(
        None, "an earlier probe, whose answers are reused where nothing has changed", metavar="RUN"
    )


@dataclass(kw_only=True)
class ReportOptions:
    """One HTML page of scores, samples and answers. It opens without a server or a network."""

    files: list[str] | None = option(
        None, "runs of `evaluate`, files of predictions, files of samples", metavar="RUN|FILE"
    )
    eval_data_path: Path_ | None = option(None, "JSONL file of the samples (default: the run's own)")
    frames_dir: Path_ | None = option(None, "folder of frames: <frames_dir>/<video_id>/<frame>.jpg")
    audio_dir: Path_ | None = option(None, "folder of spoken questions")
    eval_audio_dir: Path_ | None = option(None, "folder of spoken evaluation questions (default: audio_dir)")
    output: Path_ = option(Path_("report.html"), "HTML file to write")
    title: str | None = option(None, "title of the page (default: the models' names)")
    max_mb: float = option(40.0, "largest page in MB (1e6 bytes); thumbnails shrink to fit", above=0)
    link: bool = option(False, "link to frames and recordings by path instead of embedding them")
    limit: int | None = option(None, "show only the first LIMIT samples", least=1)


@dataclass(kw_only=True)
class EvidenceOptions:
    """One folder with the evidence for a result: runs, scores, hashes, curves, and a model card."""

    runs: list[str] | None = option(None, "runs of train, evaluate, merge, probe", metavar="RUN")
    output: Path_ = option(Path_("evidence"), "folder to make")
    eval_data_path: Path_ | None = option(
        None, "JSONL file of evaluation samples, if the run's own is not on this machine"
    )
    train_data_path: Path_ | None = option(
        None, "JSONL file of training samples, for the majority label, if the run's own is not on this machine"
    )
    check: Path_ | None = option(
        None, "read an existing evidence folder again and list what no longer matches", metavar="DIR"
    )


@dataclass(kw_only=True)
class PublishOptions:
    """Publishes an adapter or a checkpoint with its card on the Hugging Face hub: weights and card, never data."""

    source: str = option(help="training run, adapter folder or checkpoint folder")
    repo: str = option(help="repository on the hub: USER/NAME", metavar="USER/NAME")
    evidence: Path_ = option(Path_("evidence"), "folder made by `surgvqa evidence`, whose card is published too")
    base_model: str | None = option(
        None, "the base checkpoint's name on the hub, in place of its path here", metavar="USER/NAME"
    )
    public: bool = option(False, "make a new repository public (default: private)")
    yes: bool = option(False, "do not ask before uploading")


@dataclass(kw_only=True)
class AskOptions(DataOptions):
    """One answer to one spoken question."""

    checkpoint: Path_ = option(help="adapter folder, checkpoint folder, or run id")
    model_name_or_path: Path_ | None = option(
        None, "base checkpoint of an adapter (default: the one it was trained on)"
    )
    force: bool = option(False, "ask with another input_mode or audio_span than the adapter was trained with")
    interactive: bool = option(
        False, "ask one question after another about the samples of eval_data_path; the model stays loaded"
    )
    eval_data_path: Path_ | None = option(None, "JSONL file of samples to choose from (interactive)")
    frames_dir: Path_ | None = option(None, "folder of frames: <frames_dir>/<video_id>/<frame>.jpg (interactive)")
    audio_dir: Path_ | None = option(None, "folder of spoken questions (interactive)")
    eval_audio_dir: Path_ | None = option(None, "folder of spoken evaluation questions (default: audio_dir)")
    frames: list[Path_] | None = option(None, "the clip's frames, in order")
    audio: Path_ | None = option(None, "the spoken question")
    question: str | None = option(None, "the question in writing, for input_mode audio_text or text_only")
    max_new_tokens: int = option(32, "longest answer in tokens", least=1)
    attn_implementation: str = option(
        "auto", "attention kernel", choices=("auto", "flash_attention_2", "sdpa", "eager")
    )
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))


@dataclass(kw_only=True)
class BudgetOptions(DataOptions, LoraOptions):
    """The memory table of a configuration. No weights are loaded."""

    model_name_or_path: Path_ | None = option(None, "checkpoint folder (default: the real model's sizes)")
    budget_gb: float = option(BUDGET_GB, "GPU memory that the run may take, GB = 1e9 bytes", above=0)
    per_device_train_batch_size: int = option(1, "samples a micro step", least=1)
    gradient_accumulation_steps: int = option(4, "micro steps an optimiser step", least=1)
    gradient_checkpointing: bool = option(True, "recompute activations in the backward pass instead of keeping them")
    checkpointed_layers: int | None = option(None, "how many of the language model's layers recompute (default: all)")
    compile: str = option(
        "auto", "compile the language model's layers, which then keep less: auto = on", choices=("auto", "on", "off")
    )
    keep_activations: str = option(
        "auto", "what a compiled layer keeps: all, or only matrix products", choices=("auto", "all", "products")
    )
    feature_cache: str = option("auto", "auto = encoders off the GPU, off = run in every step", choices=("auto", "off"))
    optim: str = option("auto", "optimiser: auto = 8-bit AdamW")
    gpus: str = option("1", "GPUs that train together; the table shows the memory of each")
    shard: bool = option(False, "divide the language model among them")


@dataclass(kw_only=True)
class DemoOptions:
    """The embedded workspace: small model, small data, all real formats."""

    directory: Path_ = option(Path_("demo"), "folder to make the workspace in", metavar="DIR")
    run: bool = option(False, "then run merge, audit, train and evaluate without the panel, and print the report")
    demo_seed: int = option(0, "seed of the clips, the voices and the weights", least=0)


@dataclass(kw_only=True)
class HostOptions:
    """Where remote work goes; read by the panel and surgvqa-remote."""

    host: str | None = option(None, "default host: a name of ~/.ssh/config or hosts.toml")
    stage1_hub_id: str | None = option(
        None, "Stage 1 on the Hugging Face hub, USER/NAME or USER/NAME@REVISION, for hosts to download"
    )


COMMAND_OPTIONS: dict[str, type] = {
    "demo": DemoOptions,
    "merge": MergeOptions,
    "audit": AuditOptions,
    "check-data": CheckDataOptions,
    "split": SplitOptions,
    "speak": SpeakOptions,
    "budget": BudgetOptions,
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
    "compare": CompareOptions,
    "probe": ProbeOptions,
    "ask": AskOptions,
    "report": ReportOptions,
    "evidence": EvidenceOptions,
    "publish": PublishOptions,
    "host": HostOptions,
}
