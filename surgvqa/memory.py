"""The GPU memory of a training step, predicted: which tensors live when, added up at the fullest moment.

Nothing is loaded and no constant is fitted to a run. The tensors are those that autograd keeps in transformers 5's
Qwen2VLDecoderLayer with PEFT's LoRA under bf16 autocast (modeling_qwen2_vl.py, peft/tuners/lora/layer.py,
torch/utils/checkpoint.py); tests/test_memory.py holds the sums to a trace of the real classes, benchmarks/memory.py to
a GPU. A step passes through phases, and the peak is the fullest of them, not the sum of everything:

    encode              vision tower without gradient
    forward             the last layer, when everything kept is there; autocast's bf16 copies of adapters too
    loss, loss backward the logits of the supervised positions
    backward (kept)     the last layer that keeps its activations
    backward (recompute) the last layer that recomputes: all checkpoints, one layer's activations and its temporaries
    optimiser           the moments' temporaries

GB = 1e9 bytes. T is tokens of a batch, h hidden, m intermediate, q and k widths of queries and keys, r LoRA rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from surgvqa.architecture import BF16, Clip, Sizes, checkpoint_sizes, clip_of
from surgvqa.config import DataOptions, LoraOptions, TrainOptions, settings_of

GB = 1e9
MARGIN = 0.02
"""Share of the budget that `fit` leaves free: as much as a prediction may be too low."""
MIB = 2**20
FP32 = 4
CUBLAS_WORKSPACES = 4 * 32 * MIB
"""cuBLAS and cuBLASLt, one each for the forward and for the backward thread; 32 MiB on Hopper
(aten/src/ATen/cuda/CublasHandlePool.cpp, CUDABlas.cpp); less on older cards."""
CUDA_CONTEXT = 0.81 * GB
"""What the driver holds for a process beside torch's allocator: context and loaded kernels. Measured on an H100, the
same in six configurations (benchmarks/train_step.py: driver_gb less reserved_gb, 2026-11-22)."""
MIN_8BIT = 4096
"""bitsandbytes keeps float32 moments for smaller tensors; larger ones take a byte and a float32 scale per 256."""
LENGTH_BUCKET = 64
"""training.LENGTH_BUCKET, which this module cannot import."""
TRANSFER_COLUMNS = 3
"""input_ids, attention_mask, labels: int64."""

TRAIN_DEFAULTS = {name: setting.default for name, setting in settings_of(TrainOptions).items()}

PARTS = {
    "lm": "language model",
    "embeddings": "token embeddings and head",
    "vision": "vision tower",
    "audio": "audio encoder",
    "projector": "audio projector",
}


@dataclass(frozen=True)
class Configuration:
    """What a step's memory depends on beside the model's sizes."""

    clip: Clip
    batch: int = 1
    accumulation: int = 4
    """Micro steps of an optimiser step; from the second one on all gradients are there. Their inputs all wait on the
    GPU: transformers' Trainer collects the window first."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    adapter_bytes: int = FP32
    """Bytes of an adapter parameter; its gradient takes as many."""
    casts_lora_inputs: bool = True
    """PEFT casts a LoRA module's input to the adapter's dtype, autocast casts it back (layers.lora_without_casts)."""
    eight_bit: bool = True
    """8-bit AdamW (bitsandbytes); else torch's, whose moments have the adapter's dtype."""
    checkpointed_layers: int | None = None
    """The first so many layers recompute (None: all)."""
    supervised_tokens: int | None = None
    """Positions of a sample with a label (None: the answer's); logits exist only there."""
    padded: bool = False
    """The samples of a batch differ in length: attention takes a mask and torch's memory-efficient kernel."""
    eager_attention: bool = False
    cached_features: bool = False
    """The frozen encoders' outputs come from a cache; the encoders do not run."""
    encoders_resident: bool = True
    """The encoders' weights are on the GPU."""
    compiled: bool = False
    """The layers are compiled (layers.compile_layers), and rows are padded to multiples of LENGTH_BUCKET."""
    keep: float = 1.0
    """Share of its activations that a compiled layer which does not recompute keeps."""
    expandable_segments: bool = False
    """PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: next to no slack."""

    @property
    def tokens(self) -> int:
        """Of a batch, padding included."""
        bucket = LENGTH_BUCKET if self.compiled else 1
        return self.batch * -(-self.clip.tokens // bucket) * bucket

    def recomputing(self, sizes: Sizes) -> int:
        """Layers that recompute."""
        wanted = self.checkpointed_layers
        return sizes.num_hidden_layers if wanted is None else min(wanted, sizes.num_hidden_layers)


@dataclass(frozen=True)
class Component:
    """One row of the memory table."""

    name: str
    group: str
    """weights, training, activations (together the allocated peak), reserved (allocator slack), driver (context)."""
    bytes: float
    """At the peak."""
    peak_bytes: float
    """The most it takes in any phase."""


@dataclass(frozen=True)
class Prediction:
    """The memory of a step. Peak: torch's max_memory_allocated; reserved: max_memory_reserved; driver: nvidia-smi."""

    components: list[Component]
    phase: str
    """Where the peak is."""
    phases: dict[str, float]
    """Allocated bytes at each phase's fullest moment."""
    configuration: Configuration
    layers: int

    def _sum(self, *groups: str) -> float:
        return sum(c.bytes for c in self.components if c.group in groups)

    @property
    def peak_bytes(self) -> float:
        return self._sum("weights", "training", "activations")

    @property
    def predicted_peak_gb(self) -> float:
        return self.peak_bytes / GB

    @property
    def predicted_reserved_gb(self) -> float:
        return self.predicted_peak_gb + self._sum("reserved") / GB

    @property
    def predicted_driver_gb(self) -> float:
        return self.predicted_reserved_gb + self._sum("driver") / GB

    @property
    def plan(self) -> str:
        """The configuration in words."""
        c = self.configuration
        kept = self.layers - (self.layers if c.checkpointed_layers is None else c.checkpointed_layers)
        return (
            f"{c.clip.frames} frames of {c.clip.image_tokens // max(c.clip.frames, 1)} tokens, batch {c.batch}, "
            f"{self.layers - kept} of {self.layers} layers recompute, LoRA r={c.lora.lora_r} in "
            f"{'float32' if c.adapter_bytes == FP32 else 'bfloat16'}, {'8' if c.eight_bit else '32'}-bit AdamW, "
            f"encoders {'cached' if c.cached_features else 'run each step'}{', compiled' if c.compiled else ''}"
        )

    def fits(self, budget_gb: float) -> bool:
        return self.predicted_peak_gb <= budget_gb


# --- the parts -------------------------------------------------------------------------------------------------------


def block(nbytes: float, expandable: bool = False) -> int:
    """Bytes that torch's caching allocator counts for a tensor (c10/cuda/CUDACachingAllocator.cpp).

    Multiples of 512. From 10 MiB on a tensor gets a segment of its own in multiples of 2 MiB, and a rest of up to 1 MiB
    is not split off; expandable segments split everything.
    """
    size = -(-int(nbytes) // 512) * 512
    if size < 10 * MIB or expandable:
        return size
    segment = -(-size // (2 * MIB)) * 2 * MIB
    return segment if segment - size <= MIB else size


def adapter_tensors(sizes: Sizes, lora: LoraOptions) -> list[int]:
    """Parameters of each trained tensor: A [r, in] and B [out, r] of each matched module, and the projector's copy."""
    shapes = sizes.projections()
    matrices = [
        lora.lora_r * width
        for module, layers in sizes.lora_targets(lora.lora_target_modules).items()
        for _ in layers
        for width in shapes[module]
    ]
    return [*matrices, sizes.d_model * sizes.hidden_size]


def optimiser_bytes(tensors: list[int], c: Configuration) -> int:
    """Two moments of each trained tensor (Dettmers et al. 2022, block-wise quantisation with blocks of 256)."""

    def moment(parameters: int) -> int:
        if not c.eight_bit:
            return parameters * c.adapter_bytes
        return parameters * FP32 if parameters < MIN_8BIT else parameters + FP32 * -(-parameters // 256)

    return sum(2 * block(moment(n), c.expandable_segments) for n in tensors)


def layer_tensors(sizes: Sizes, c: Configuration, targeted: set[str]) -> dict[str, float]:
    """What autograd keeps of one Qwen2VLDecoderLayer, bytes a token, by tensor.

    Frozen linear modules keep no input. RMSNorm keeps its float32 copy; attention its rotated q and k, v, output and
    log-sum-exp; SwiGLU gate, silu(gate) and up. A LoRA module keeps its dropout mask (a byte an element), the bf16
    input of A, and A's output. Without dropout and without a cast that input is the norm's output itself, shared by q,
    k, v and by gate, up.
    """
    h, m, kv, heads = sizes.hidden_size, sizes.intermediate_size, sizes.kv_size, sizes.num_attention_heads
    kept: dict[str, float] = {"norm 1": FP32 * h + FP32, "norm 2": FP32 * h + FP32}
    repeated = c.padded or c.eager_attention  # with a mask, keys and values are repeated for all heads
    kept |= {"q": BF16 * h, "k": BF16 * (h if repeated else kv), "v": BF16 * (h if repeated else kv)}
    kept |= {"attention": BF16 * h, "log-sum-exp": FP32 * heads}
    if c.eager_attention:
        kept["probabilities"] = (FP32 + BF16) * heads * c.clip.tokens
    kept |= {"gate": BF16 * m, "up": BF16 * m, "silu": BF16 * m}
    dropout = c.lora.lora_dropout > 0
    copies = dropout or _casts(c)
    for module in targeted:
        inputs = sizes.projections()[module][0]
        kept[f"{module} A"] = BF16 * c.lora.lora_r
        if dropout:
            kept[f"{module} mask"] = inputs
        if copies:
            kept[f"{module} input"] = BF16 * inputs
    if not copies:
        shared = {"q": "qkv input", "k": "qkv input", "v": "qkv input", "gate": "gate/up input", "up": "gate/up input"}
        for module in targeted:
            projection = module.rpartition(".")[2].removesuffix("_proj")
            if projection in shared:
                kept[shared[projection]] = BF16 * h
            elif projection == "down":
                kept["down input"] = BF16 * m
    return kept


def compiled_layer_tensors(sizes: Sizes, c: Configuration, targeted: set[str]) -> dict[str, float]:
    """What a compiled layer keeps, bytes a token: the smallest cut through its graph (torch/_functorch/partitioners.py)
    when matrix products, attention and random masks are not computed twice and everything between them is.

    Beside its input: the hidden state after attention, q, k, v, attention's output and log-sum-exp, gate, up and their
    product, each LoRA module's A output and mask. `c.keep` scales all but the input.
    """
    h, m, kv = sizes.hidden_size, sizes.intermediate_size, sizes.kv_size
    kept: dict[str, float] = {"after attention": BF16 * h, "q": BF16 * h, "k": BF16 * kv, "v": BF16 * kv}
    kept |= {"attention": BF16 * h, "log-sum-exp": FP32 * sizes.num_attention_heads}
    kept |= {"gate": BF16 * m, "up": BF16 * m, "product": BF16 * m}
    for module in targeted:
        kept[f"{module} A"] = BF16 * c.lora.lora_r
        if c.lora.lora_dropout > 0:
            kept[f"{module} mask"] = sizes.projections()[module][0]
    return {"input": BF16 * h, **{name: c.keep * nbytes for name, nbytes in kept.items()}}


def _casts(c: Configuration) -> bool:
    return c.casts_lora_inputs and c.adapter_bytes == FP32


def temporaries(sizes: Sizes, c: Configuration, targeted: set[str]) -> dict[str, float]:
    """The most that comes on top of what a layer keeps, bytes a token, by moment; all of them at down_proj, whose
    input is the widest.

    Going forward: its input and PEFT's float32 copies of it (before and after dropout), beside the layer's input, the
    hidden state after attention, norm 2's output (where it is not kept) and down_proj's result. Recomputing stops at
    the last tensor that is needed; instead of the input (a checkpoint) there are the output's gradient and LoRA's share
    of it. Going backward: the gradients of silu(gate), of up and of their product, or dropout's in float32; by then
    down_proj's own tensors are gone.
    """
    h, m = sizes.hidden_size, sizes.intermediate_size
    lora, dropout, casts = "mlp.down_proj" in targeted, c.lora.lora_dropout > 0, _casts(c)
    hidden = BF16 * h
    normed = hidden if dropout or casts else 0
    copies = (BF16 * m + FP32 * m if casts else BF16 * m if dropout else 0) if lora else BF16 * m
    in_dropout = copies + FP32 * m if lora and casts and dropout else 0
    kept_by_down = ((BF16 * m) + (m if dropout else 0)) if lora else 0
    gradients = 3 * BF16 * m - kept_by_down
    if lora and casts and dropout:
        gradients = max(gradients, 2 * FP32 * m - BF16 * m)
    return {
        "forward": max(in_dropout + hidden, copies + 3 * hidden) + 2 * hidden + normed,
        "recompute": max(max(in_dropout, copies) + 4 * hidden + normed, gradients + hidden + normed),
        "backward": gradients + hidden,
    }


def encoder_temporaries(sizes: Sizes, c: Configuration) -> float:
    """The vision tower's widest moment: rotating the keys in float32.

    Bytes per patch and width e: hidden 2, the norm's output 4 (autocast runs it in float32), qkv 6, float32 q and k 8,
    rotated q 4, and k's three products 12. Whisper's is the feed-forward of 1500 positions, far less.
    """
    vision = 36 * sizes.vision_embed_dim * c.batch * c.clip.patches
    audio = (3 * BF16 * sizes.encoder_ffn_dim + 3 * BF16 * sizes.d_model) * c.batch * sizes.max_source_positions
    return max(vision, audio)


# --- the sum ---------------------------------------------------------------------------------------------------------


def predict(sizes: Sizes, c: Configuration, weights: dict[str, list[int]] | None = None) -> Prediction:
    """The memory of one optimiser step in steady state (the second one: the optimiser has its moments).

    `weights` ({part: parameters of each tensor}) default to the architecture's; all are held in bf16.
    """

    def size(nbytes: float) -> int:
        return block(nbytes, c.expandable_segments)

    weights = weights or sizes.weights()
    tokens, h = c.tokens, sizes.hidden_size
    layers, recomputing = sizes.num_hidden_layers, c.recomputing(sizes)
    kept_layers = layers - recomputing
    targets = sizes.lora_targets(c.lora.lora_target_modules)
    trained = adapter_tensors(sizes, c.lora)
    adapters = sum(size(n * c.adapter_bytes) for n in trained)
    autocast = sum(size(n * BF16) for n in trained[:-1]) if c.adapter_bytes == FP32 else 0
    hidden = size(BF16 * h * tokens)

    def targeted(layer: int) -> set[str]:
        return {module for module, numbers in targets.items() if layer in numbers}

    def kept_by(layer: int, recomputes: bool = False) -> float:
        """A layer's activations, and the bf16 copies of its adapters, which autograd holds."""
        tensors = compiled_layer_tensors if c.compiled and not recomputes else layer_tensors
        return sum(size(n * tokens) for n in tensors(sizes, c, targeted(layer)).values()) + autocast / layers

    def temporary(moment: str, layer: int) -> float:
        return temporaries(sizes, c, targeted(layer))[moment] * tokens

    resident = _weights(sizes, c, weights)
    resident["adapters"] = adapters
    resident["optimiser states"] = optimiser_bytes(trained, c)
    resident["cuBLAS workspaces"] = CUBLAS_WORKSPACES
    features = c.batch * (BF16 * h * c.clip.image_tokens + BF16 * sizes.d_model * c.clip.audio_tokens)
    columns = TRANSFER_COLUMNS * 8 * tokens
    if c.cached_features:
        resident["cached features in flight"] = c.accumulation * (features + columns)
    else:
        mels = FP32 * 2 * sizes.max_source_positions * sizes.num_mel_bins
        pixels = FP32 * sizes.patch_values * c.clip.patches
        resident["inputs"] = c.accumulation * (c.batch * (mels + pixels) + columns)
        resident["encoders' outputs"] = features
    if c.accumulation > 1:
        resident["gradients"] = adapters
    if c.padded:
        resident["attention mask"] = (1 + BF16) * c.batch * c.clip.tokens**2

    saved = Counter({"checkpoints": recomputing * hidden})
    saved["activations kept"] = sum(kept_by(layer) for layer in range(recomputing, layers))
    labels = c.batch * (c.clip.answer_tokens if c.supervised_tokens is None else c.supervised_tokens)
    logits = sizes.vocab_size * labels
    last = layers - 1

    phases: dict[str, Counter[str]] = {}
    phases["encode"] = Counter({"encoders' temporaries": 0 if c.cached_features else encoder_temporaries(sizes, c)})
    phases["encode"]["layer temporaries"] = hidden  # the token embeddings
    phases["forward"] = saved + Counter(
        {
            "bf16 copies of adapters": autocast * recomputing / layers,
            "layer temporaries": temporary("forward", last) + (0 if recomputing else hidden),
        }
    )
    phases["loss"] = saved + Counter(
        {
            "bf16 copies of adapters": autocast * recomputing / layers,
            "layer temporaries": size(FP32 * h * tokens) + 2 * hidden,
            "logits and loss": (BF16 + 2 * FP32) * logits + BF16 * h * labels,
        }
    )
    phases["loss backward"] = saved + Counter(
        {"layer temporaries": size(FP32 * h * tokens), "logits and loss": 3 * FP32 * logits + BF16 * h * labels}
    )
    if kept_layers:
        phases["backward (kept)"] = saved + Counter({"layer temporaries": temporary("backward", last)})
    if recomputing:
        layer = recomputing - 1
        phases["backward (recompute)"] = Counter(
            {
                "checkpoints": recomputing * hidden,
                "recomputed layer": kept_by(layer, recomputes=True),
                "layer temporaries": temporary("recompute", layer),
            }
        )
        if c.accumulation == 1:  # gradients come as checkpoints go
            per_layer = adapters / layers
            phases["backward (recompute)"]["gradients"] = max(
                kept_layers * per_layer, adapters - per_layer - (recomputing - 1) * hidden
            )
    phases["optimiser"] = Counter({"gradients": adapters if c.accumulation == 1 else 0})
    if not c.eight_bit:
        phases["optimiser"]["optimiser temporaries"] = adapters

    return _prediction(resident, phases, _slack(sizes, c, tokens, logits), c, layers)


def predict_generation(sizes: Sizes, c: Configuration, weights: dict[str, list[int]] | None = None) -> Prediction:
    """The memory of answering `c.batch` samples at once, without gradient and without autocast (generate.py).

    Prefill is fullest in up_proj of the last layer: the key-value cache; silu(gate) 2m; up's own result 2m, and with a
    float32 adapter its B's output scaled 4m and the float32 sum 4m; hidden, norm and its float32 copy.
    `c.adapter_bytes` 0: no adapter.
    """

    def size(nbytes: float) -> int:
        return block(nbytes, c.expandable_segments)

    weights = weights or sizes.weights()
    tokens, h, m = c.tokens, sizes.hidden_size, sizes.intermediate_size
    resident = _weights(sizes, c, weights)
    if c.adapter_bytes:
        resident["adapters"] = sum(size(n * c.adapter_bytes) for n in adapter_tensors(sizes, c.lora))
    resident["cuBLAS workspaces"] = CUBLAS_WORKSPACES // 2  # one thread
    resident["inputs"] = c.batch * FP32 * sizes.patch_values * c.clip.patches
    resident["layer temporaries"] = 2 * size(BF16 * h * tokens)  # token embeddings before and after the features
    wide = 6 if not c.adapter_bytes else 4 + 2 * c.adapter_bytes
    narrow = 2 * BF16 + (FP32 if c.adapter_bytes == FP32 else 0)
    cache = sizes.num_hidden_layers * 2 * size(BF16 * sizes.kv_size * tokens)
    image = c.batch * BF16 * h * c.clip.image_tokens
    phases = {
        "encode": Counter({"encoders' temporaries": encoder_temporaries(sizes, c)}),
        "prefill": Counter(
            {
                "key-value cache": cache,
                "encoders' outputs": image,
                "layer temporaries": (wide * m + narrow * h) * tokens,
                "logits and loss": (BF16 + FP32) * sizes.vocab_size * c.batch,
            }
        ),
    }
    return _prediction(resident, phases, _slack(sizes, c, tokens, 0), c, sizes.num_hidden_layers)


def _weights(sizes: Sizes, c: Configuration, weights: dict[str, list[int]]) -> Counter[str]:
    """Bytes of the frozen weights that are on the GPU, by the part's name."""
    return Counter(
        {
            name: sum(block(BF16 * n, c.expandable_segments) for n in weights[part])
            for part, name in PARTS.items()
            if c.encoders_resident or part not in ("vision", "audio")
        }
    )


def _prediction(
    resident: Counter[str], phases: dict[str, Counter[str]], slack: float, c: Configuration, layers: int
) -> Prediction:
    """The table of what is always there (`resident`) and what each phase holds besides, in bytes."""
    totals = {name: float(sum((resident + held).values())) for name, held in phases.items()}
    phase = max(totals, key=totals.__getitem__)
    at_peak = resident + phases[phase]
    names = dict.fromkeys([*resident, *(name for held in phases.values() for name in held)])
    components = [
        Component(name, _group(name), at_peak[name], max((resident + held)[name] for held in phases.values()))
        for name in names
    ]
    slack = 0.0 if c.expandable_segments else slack
    components.append(Component("allocator slack", "reserved", slack, slack))
    components.append(Component("CUDA context", "driver", CUDA_CONTEXT, CUDA_CONTEXT))
    return Prediction([x for x in components if x.peak_bytes], phase, totals, c, layers)


def _group(name: str) -> str:
    if name in PARTS.values():
        return "weights"
    return "training" if name in ("adapters", "gradients", "optimiser states", "cuBLAS workspaces") else "activations"


def _slack(sizes: Sizes, c: Configuration, tokens: int, logits: int) -> float:
    """Freed blocks that fit no later request: about the two largest temporaries of a layer, and one of the logits'."""
    return 2 * (FP32 if _casts(c) else BF16) * sizes.intermediate_size * tokens + FP32 * logits


# --- fitting ---------------------------------------------------------------------------------------------------------


def fit(
    sizes: Sizes, c: Configuration, budget_gb: float, weights: dict[str, list[int]] | None = None
) -> Prediction | None:
    """The fewest recomputing layers whose predicted peak, with a margin for the prediction's error, is within the
    budget (recomputing all of them costs a quarter of a step's time); None when not even that is."""
    for count in range(sizes.num_hidden_layers + 1):
        found = predict(sizes, replace(c, checkpointed_layers=count), weights)
        if found.fits(budget_gb * (1 - MARGIN)):
            return found
    return None


def configuration(sizes: Sizes, options: DataOptions, **overrides: Any) -> Configuration:
    """The configuration in which `options` (of train or budget) train on a CUDA GPU, see training.py; `overrides` are
    fields of Configuration."""
    lora = options if isinstance(options, LoraOptions) else LoraOptions()

    def value(name: str) -> Any:
        return getattr(options, name, TRAIN_DEFAULTS[name])

    cached = value("feature_cache") != "off"
    fields: dict[str, Any] = {
        "clip": clip_of(sizes, options),
        "batch": value("per_device_train_batch_size"),
        "accumulation": value("gradient_accumulation_steps"),
        "lora": LoraOptions(**{name: getattr(lora, name) for name in LoraOptions.__dataclass_fields__}),
        "casts_lora_inputs": False,
        "eight_bit": value("optim") == "auto" or "8bit" in value("optim"),
        "checkpointed_layers": value("checkpointed_layers") if value("gradient_checkpointing") else 0,
        "cached_features": cached,
        "encoders_resident": not cached,
        "compiled": value("compile") != "off",
        "keep": value("keep_activations"),
    }
    return Configuration(**(fields | overrides))


def predict_options(options: DataOptions, **overrides: Any) -> Prediction:
    """The prediction for TrainOptions or BudgetOptions: of their checkpoint, or of the real model without one."""
    folder = getattr(options, "model_name_or_path", None)
    sizes, weights = checkpoint_sizes(folder) if folder else (Sizes(), None)
    return predict(sizes, configuration(sizes, options, **overrides), weights)
