"""Predicts the GPU memory of a training step: the sum of all tensors that exist at the same moment, at its peak.

Nothing is loaded and no constant is fitted to a run. activations.py lists the tensors; benchmarks/memory.py compares
the sums with a GPU. A step has several phases, and the peak is the largest of them, not their sum:

    encode              vision tower without gradient
    forward             the last layer, when all kept tensors and autocast's bf16 copies of adapters exist
    loss, loss backward the logits of the supervised positions
    backward (kept)     the last layer that keeps its activations
    backward (recompute) the last layer that recomputes: all layer inputs, one layer's activations and its temporaries
    optimiser           the moments' temporaries

GB = 1e9 bytes. T is the number of tokens in a batch, h the hidden size, m the intermediate size, q and k the widths of
queries and keys, r the LoRA rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from surgvqa.config.options import DataOptions, LoraOptions, TrainOptions
from surgvqa.config.settings import settings_of
from surgvqa.memory.activations import (
    FP32,
    MIB,
    Configuration,
    block,
    encoder_temporaries,
    last_layer_tensors,
    layer_tensors,
    temporaries,
)
from surgvqa.memory.clip import clip_of
from surgvqa.model.sizes import BF16, Sizes, checkpoint_sizes

GB = 1e9
CUBLAS_WORKSPACES = 4 * 32 * MIB
"""Workspaces of cuBLAS and cuBLASLt, one each for the forward and the backward thread: 32 MiB on Hopper
(aten/src/ATen/cuda/CublasHandlePool.cpp, CUDABlas.cpp), less on older cards."""
CUDA_CONTEXT = 0.81 * GB
"""Memory that the driver uses for a process outside torch's allocator: context and loaded kernels. Measured on an H100,
the same in six configurations (benchmarks/train_step.py: driver_gb less reserved_gb, 2026-11-22)."""
NCCL = 880_000_000
"""Bytes of NCCL in a process that trains with another one of the same machine, as nvidia-smi shows them beyond what the
process takes alone (two H200s, docs/benchmarks.md). Gradients are summed in place, so torch has no buffers for them."""
GATHERED_AT_ONCE = 2
"""Whole layers on the GPU while one of a divided model computes: its own, and the buffer in which it came (forward) or
the next one comes (backward)."""
MIN_8BIT = 4096
"""bitsandbytes keeps float32 moments for smaller tensors. Larger ones take one byte per value and a float32 scale for
each 256."""
ROOM_TO_ANSWER = 96
"""Tokens in a row of the key-value cache beyond the prompt: 32 of the answer, and those from rounding up lengths
(model/generation.py)."""
GATHERED = "gathered layers"
TRANSFER_COLUMNS = 3
"""input_ids, attention_mask, labels: int64."""

TRAIN_DEFAULTS = {name: setting.default for name, setting in settings_of(TrainOptions).items()}

PARTS = {  # the token embeddings stay on the host (model.load_model)
    "lm": "language model",
    "head": "language model's head",
    "vision": "vision tower",
    "audio": "audio encoder",
    "projector": "audio projector",
}


@dataclass(frozen=True)
class Component:
    """One row of the memory table."""

    name: str
    group: str
    """weights, training, activations (together the allocated peak), reserved (allocator slack) or driver (context)."""
    bytes: float
    """Bytes at the step's peak."""
    peak_bytes: float
    """The component's own maximum over all phases."""


@dataclass(frozen=True)
class MemoryPrediction:
    """The predicted memory of a step.

    Peak is torch's max_memory_allocated, reserved its max_memory_reserved, driver what nvidia-smi shows.
    """

    components: list[Component]
    phase: str
    """The phase with the peak."""
    phases: dict[str, float]
    """{phase: allocated bytes at its peak}."""
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
    def kept(self) -> str:
        """What a compiled layer keeps, for messages."""
        return "all activations" if self.configuration.keep == "all" else "only matrix products"

    @property
    def plan(self) -> str:
        """The configuration, for messages."""
        c = self.configuration
        kept = self.layers - (self.layers if c.checkpointed_layers is None else c.checkpointed_layers)
        return (
            f"{c.clip.frames} frames of {c.clip.image_tokens // max(c.clip.frames, 1)} tokens, batch {c.batch}, "
            f"{self.layers - kept} of {self.layers} layers recompute, LoRA r={c.lora.lora_r} in "
            f"{'float32' if c.adapter_bytes == FP32 else 'bfloat16'}, {'8' if c.eight_bit else '32'}-bit AdamW, "
            f"encoders {'cached' if c.cached_features else 'run each step'}"
            f"{f', compiled, {self.kept} kept' if c.compiled else ''}"
            f"{f', layers divided among {c.parts} GPUs' if c.parts > 1 else ''}"
        )

    @property
    def peak_table(self) -> dict[str, int]:
        """{component: bytes at the peak} of the allocated memory, for a run's events."""
        listed = [c for c in self.components if c.group not in ("reserved", "driver") and round(c.bytes)]
        return {c.name: round(c.bytes) for c in listed}

    def fits(self, budget_gb: float, capped: bool = False) -> bool:
        """See `needed_gb`."""
        return self.needed_gb(capped) <= budget_gb

    def needed_gb(self, capped: bool = False) -> float:
        """GB that the budget must have: the allocated peak, or all reserved memory if the allocator is `capped`
        (TrainOptions.enforce_budget)."""
        return self.predicted_reserved_gb if capped else self.predicted_peak_gb


# --- the parts -------------------------------------------------------------------------------------------------------


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
    """Bytes of both moments of all trained tensors (Dettmers et al. 2022, block-wise quantisation in blocks of 256)."""

    def moment(parameters: int) -> int:
        if not c.eight_bit:
            return parameters * c.adapter_bytes
        return parameters * FP32 if parameters < MIN_8BIT else parameters + FP32 * -(-parameters // 256)

    return sum(2 * block(moment(n), c.expandable_segments) for n in tensors)


# --- the sum ---------------------------------------------------------------------------------------------------------


def predict(sizes: Sizes, c: Configuration, weights: dict[str, list[int]] | None = None) -> MemoryPrediction:
    """The memory of one optimiser step in steady state, when the optimiser has its moments (from the second step on).

    `weights` ({part: parameters of each tensor}) default to the architecture's; all are in bf16.
    """

    def size(nbytes: float) -> int:
        return block(nbytes, c.expandable_segments)

    weights = weights or sizes.weights()
    tokens, h = c.tokens, sizes.hidden_size
    layers = sizes.num_hidden_layers
    whole = layers - c.reads_few  # layers that are computed at all positions
    recomputing = min(c.recomputing(sizes), whole)
    kept_layers = whole - recomputing
    targets = sizes.lora_targets(c.lora.lora_target_modules)
    trained = adapter_tensors(sizes, c.lora)
    adapters = sum(size(n * c.adapter_bytes) for n in trained)
    # bf16 copies of adapters that a layer keeps; uncompiled, autocast also keeps those of layers that recompute
    copied = c.adapter_bytes == FP32 and not (c.compiled and c.keep != "all")
    copies = sum(size(n * BF16) for n in trained[:-1]) if copied else 0
    autocast = 0 if c.compiled else copies
    hidden = size(BF16 * h * tokens)

    def targeted(layer: int) -> set[str]:
        return {module for module, numbers in targets.items() if layer in numbers}

    def kept_by(layer: int, recomputes: bool = False) -> float:
        """Bytes of a layer's activations and of its adapters' bf16 copies, which autograd keeps."""
        tensors = layer_tensors(sizes, c, targeted(layer))
        if recomputes:
            tensors.pop("input", None)  # counted as the layer's kept input
        return sum(size(n * tokens) for n in tensors.values()) + copies / layers

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

    saved: Counter[str] = Counter({"checkpoints": recomputing * hidden})
    kept = sum((kept_by(layer) for layer in range(recomputing, whole)), 0.0)
    saved["activations kept"] = kept  # type: ignore[assignment]  # Counter knows only int
    read = saved.copy()  # also what the last layer keeps, and from the answer's gradients on again without it
    if c.reads_few:
        few = last_layer_tensors(sizes, c, targeted(layers - 1))
        read["activations kept"] += sum(size(n * tokens) for n in few.values())
    labels = c.batch * (c.clip.answer_tokens if c.supervised_tokens is None else c.supervised_tokens)
    logits = sizes.vocab_size * labels
    last = whole - 1

    phases: dict[str, Counter[str]] = {}
    phases["encode"] = Counter({"encoders' temporaries": 0 if c.cached_features else encoder_temporaries(sizes, c)})
    phases["encode"]["layer temporaries"] = hidden  # the token embeddings
    phases["forward"] = saved + Counter(
        {
            "bf16 copies of adapters": autocast * recomputing / layers,
            "layer temporaries": temporary("forward", last) + (0 if recomputing or c.compiled else hidden),
        }
    )
    # The norm's float32 copy: of the last layer where that reads few positions, else of the final norm.
    phases["loss"] = read + Counter(
        {
            "bf16 copies of adapters": autocast * recomputing / layers,
            "layer temporaries": size(FP32 * h * tokens) + 2 * hidden,
            "logits and loss": (BF16 + 2 * FP32) * logits + BF16 * h * labels,
        }
    )
    phases["loss backward"] = read + Counter(
        {"layer temporaries": size(FP32 * h * tokens), "logits and loss": 3 * FP32 * logits + BF16 * h * labels}
    )
    if c.reads_few:  # in the backward pass of its norm, in float32; traced in tests/surgvqa/memory/test_activations.py
        phases["backward (last layer)"] = saved + Counter({"layer temporaries": 13 * hidden})
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
        if c.accumulation == 1:  # gradients are allocated while checkpoints are freed
            per_layer = adapters / layers
            gradient_bytes = max(kept_layers * per_layer, adapters - per_layer - (recomputing - 1) * hidden)
            phases["backward (recompute)"]["gradients"] = gradient_bytes  # type: ignore[assignment]  # Counter knows only int
    with_layers = ["forward", *(name for name in phases if name.startswith("backward")), *["loss"] * c.reads_few]
    for name in with_layers:
        phases[name][GATHERED] = gathered(c, weights, layers)
    phases["optimiser"] = Counter({"gradients": adapters if c.accumulation == 1 else 0})
    if not c.eight_bit:
        phases["optimiser"]["optimiser temporaries"] = adapters

    slack = _slack(sizes, c, tokens, logits) + gathered(c, weights, layers) / GATHERED_AT_ONCE
    return _prediction(resident, phases, slack, c, layers)


def predict_generation(sizes: Sizes, c: Configuration, weights: dict[str, list[int]] | None = None) -> MemoryPrediction:
    """The memory of answering `c.batch` samples at once, without gradient and without autocast (generate.py).

    The pass over the prompts has its peak in a layer's up_proj, in bytes per token: silu(gate) 2m; up's own result 2m
    and, with a float32 adapter, its B's scaled output 4m and the float32 sum 4m; hidden state, norm and its float32
    copy. `c.adapter_bytes` 0 means no adapter.
    """

    def size(nbytes: float) -> int:
        return block(nbytes, c.expandable_segments)

    weights = weights or sizes.weights()
    tokens, h, m = c.tokens, sizes.hidden_size, sizes.intermediate_size
    resident = _weights(sizes, c, weights)
    if c.adapter_bytes:
        resident["adapters"] = sum(size(n * c.adapter_bytes) for n in adapter_tensors(sizes, c.lora))
    resident["cuBLAS workspaces"] = CUBLAS_WORKSPACES // 2  # one thread
    image = c.batch * BF16 * h * c.clip.image_tokens
    if c.cached_features:  # those of this batch and of the next one, which is copied meanwhile
        resident["cached features in flight"] = 2 * (image + c.batch * BF16 * sizes.d_model * c.clip.audio_tokens)
    else:
        resident["inputs"] = 2 * c.batch * FP32 * sizes.patch_values * c.clip.patches
    resident["key-value cache"] = (
        sizes.num_hidden_layers * 2 * size(BF16 * sizes.kv_size * (tokens + c.batch * ROOM_TO_ANSWER))
    )
    resident["layer temporaries"] = 2 * size(BF16 * h * tokens)  # token embeddings before and after the features
    wide = 6 if not c.adapter_bytes else 4 + 2 * c.adapter_bytes
    narrow = 2 * BF16 + (FP32 if c.adapter_bytes == FP32 else 0)
    phases = {
        "encode": Counter({"encoders' temporaries": 0 if c.cached_features else encoder_temporaries(sizes, c)}),
        "prefill": Counter(
            {
                "encoders' outputs": 0 if c.cached_features else image,
                "layer temporaries": (wide * m + narrow * h) * tokens,
                GATHERED: gathered(c, weights, sizes.num_hidden_layers),
                "logits and loss": (BF16 + FP32) * sizes.vocab_size * c.batch,
            }
        ),
    }
    return _prediction(resident, phases, _slack(sizes, c, tokens, 0), c, sizes.num_hidden_layers)


def _weights(sizes: Sizes, c: Configuration, weights: dict[str, list[int]]) -> Counter[str]:
    """{part: bytes} of the frozen weights on the GPU."""
    parts = {"lm": c.parts}
    return Counter(
        {
            name: sum(block(BF16 * n / parts.get(part, 1), c.expandable_segments) for n in weights[part])
            for part, name in PARTS.items()
            if c.encoders_resident or part not in ("vision", "audio")
        }
    )


def gathered(c: Configuration, weights: dict[str, list[int]], layers: int) -> int:
    """Bytes of a divided model's layers that are whole while one computes.

    The two buffers in which layers come by turns are of another stream, so the allocator keeps both for it.
    """
    return GATHERED_AT_ONCE * BF16 * sum(weights["lm"]) // layers if c.parts > 1 else 0


def _prediction(
    resident: Counter[str], phases: dict[str, Counter[str]], slack: float, c: Configuration, layers: int
) -> MemoryPrediction:
    """Builds the prediction from the bytes that always exist (`resident`) and those that each phase adds."""
    totals = {name: float(sum((resident + extra).values())) for name, extra in phases.items()}
    phase = max(totals, key=totals.__getitem__)
    at_peak = resident + phases[phase]
    names = dict.fromkeys([*resident, *(name for extra in phases.values() for name in extra)])
    components = [
        Component(
            name,
            _group(name),
            at_peak[name],
            max((resident + extra)[name] for extra in phases.values()),
        )
        for name in names
    ]
    components.append(Component("allocator slack", "reserved", slack, slack))
    components.append(Component("CUDA context", "driver", CUDA_CONTEXT, CUDA_CONTEXT))
    nccl = NCCL if c.ranks > 1 else 0
    components.append(Component("NCCL's buffers", "driver", nccl, nccl))
    return MemoryPrediction([x for x in components if x.peak_bytes], phase, totals, c, layers)


def _group(name: str) -> str:
    if name in (*PARTS.values(), GATHERED):
        return "weights"
    return "training" if name in ("adapters", "gradients", "optimiser states", "cuBLAS workspaces") else "activations"


def _slack(sizes: Sizes, c: Configuration, tokens: int, logits: int) -> float:
    """Bytes of freed blocks that fit no later request: about a layer's two largest temporaries and one of logits."""
    return 2 * (FP32 if c.casts else BF16) * sizes.intermediate_size * tokens + FP32 * logits


# --- fitting ---------------------------------------------------------------------------------------------------------


def configuration(sizes: Sizes, options: DataOptions, **overrides: Any) -> Configuration:
    """The configuration in which `options` (of train or budget) train on a CUDA GPU (recipe.py).

    `overrides` are fields of Configuration.
    """
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
        "expandable_segments": True,
        "ranks": int(value("gpus")) if value("gpus").isdecimal() else 1,
        "shard": value("shard"),
    }
    return Configuration(**(fields | overrides))


def predict_options(options: DataOptions, **overrides: Any) -> MemoryPrediction:
    """The prediction for TrainOptions or BudgetOptions, for their checkpoint or, without one, for the real model."""
    folder = getattr(options, "model_name_or_path", None)
    sizes, weights = checkpoint_sizes(folder) if folder else (Sizes(), None)
    return predict(sizes, configuration(sizes, options, **overrides), weights)
