"""The activations that a training step keeps for its backward pass, tensor by tensor, and its temporary tensors.

A layer runs in one of two ways. Uncompiled, it keeps what autograd keeps in transformers 5's Qwen2VLDecoderLayer with
PEFT's LoRA under bf16 autocast (modeling_qwen2_vl.py, peft/tuners/lora/layer.py). Compiled, it keeps what torch's
min-cut partitioner keeps (torch/_functorch/partitioners.py, the same in torch 2.11 and 2.13).
tests/surgvqa/memory/test_predict.py compares both with traces of the real classes at real size.

GB = 1e9 bytes. T is the number of tokens in a batch, h the hidden size, m the intermediate size, q and k the widths of
queries and keys, r the LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from surgvqa.config.options import LoraOptions
from surgvqa.memory.clip import Clip
from surgvqa.model.sizes import BF16, Sizes

FP32 = 4
MIB = 2**20
LENGTH_BUCKET = 64
"""Equals training.LENGTH_BUCKET, which this module cannot import."""
QKV, GATE_UP, DOWN = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
)


@dataclass(frozen=True)
class Configuration:
    """Everything that a step's memory depends on, apart from the model's sizes."""

    clip: Clip
    batch: int = 1
    accumulation: int = 4
    """Micro steps per optimiser step. From the second one on, all gradients exist. The inputs of all of them are on the
    GPU, because transformers' Trainer collects the whole window first."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    adapter_bytes: int = FP32
    """Bytes of an adapter parameter, and of its gradient."""
    casts_lora_inputs: bool = True
    """PEFT casts a LoRA module's input to the adapter's dtype and autocast casts it back
    (peft_internals.without_input_casts)."""
    eight_bit: bool = True
    """8-bit AdamW (bitsandbytes); otherwise torch's AdamW, whose moments have the adapter's dtype."""
    checkpointed_layers: int | None = None
    """How many layers, from the first on, recompute (None: all)."""
    supervised_tokens: int | None = None
    """Positions of a sample with a label (None: those of the answer). Logits exist only there."""
    last_layer_whole: bool = False
    """The last layer is computed at all positions, also where a single sample's answer is all that is read."""
    padded: bool = False
    """The samples of a batch differ in length, so attention uses a mask and torch's memory-efficient kernel."""
    attention: str = "flash"
    """The kernel (attention.attention_kernel): flash (torch's), cudnn (torch's choice on Hopper), flash-attn, eager."""
    cached_features: bool = False
    """The frozen encoders' outputs come from a cache, so the encoders do not run."""
    encoders_resident: bool = True
    """The encoders' weights are on the GPU."""
    compiled: bool = False
    """The layers are compiled (layers.compile_layers), and rows are padded to a multiple of LENGTH_BUCKET."""
    keep: str = "auto"
    """What a compiled layer keeps: all, or products only (TrainOptions.keep_activations). Auto: all if `fit` finds room
    for it, else products."""
    ranks: int = 1
    """GPUs that train together."""
    shard: bool = False
    """The language model's layers are divided among them; otherwise each has the whole model."""
    expandable_segments: bool = False
    """The allocator's segments can grow (allocator.grow_segments)."""

    @property
    def tokens(self) -> int:
        """Tokens in a batch, including padding."""
        bucket = LENGTH_BUCKET if self.compiled else 1
        return self.batch * -(-self.clip.tokens // bucket) * bucket

    @property
    def reads_few(self) -> bool:
        """Whether the last layer is computed only at the answer: each micro step has a single sample."""
        return self.batch == 1 and not self.last_layer_whole

    @property
    def parts(self) -> int:
        """Among how many GPUs the language model's layers are divided."""
        return self.ranks if self.shard else 1

    @property
    def casts(self) -> bool:
        """Whether LoRA inputs exist in float32 too."""
        return self.casts_lora_inputs and self.adapter_bytes == FP32

    def recomputing(self, sizes: Sizes) -> int:
        """Number of layers that recompute."""
        wanted = self.checkpointed_layers
        return sizes.num_hidden_layers if wanted is None else min(wanted, sizes.num_hidden_layers)


def block(nbytes: float, expandable: bool = False) -> int:
    """Bytes that torch's caching allocator counts for a tensor (c10/cuda/CUDACachingAllocator.cpp).

    Sizes are multiples of 512. A tensor of 10 MiB or more gets a segment of its own in multiples of 2 MiB, from which a
    remainder of up to 1 MiB is not split off. Expandable segments split off everything.
    """
    size = -(-int(nbytes) // 512) * 512
    if size < 10 * MIB or expandable:
        return size
    segment = -(-size // (2 * MIB)) * 2 * MIB
    return segment if segment - size <= MIB else size


def layer_tensors(sizes: Sizes, c: Configuration, targeted: set[str]) -> dict[str, float]:
    """{tensor: bytes per token} that one layer keeps for its backward pass.

    `targeted`: names of its modules with LoRA.
    """
    return (_compiled_tensors if c.compiled else _plain_tensors)(sizes, c, targeted)


def last_layer_tensors(sizes: Sizes, c: Configuration, targeted: set[str]) -> dict[str, float]:
    """{tensor: bytes per token} that the last layer keeps where it is computed at the answer alone (last_layer.py).

    It is not compiled. Of its tensors for all positions there are the norm's and those of keys and values.
    """
    kept = _plain_tensors(sizes, c, targeted)
    of_all = ("norm 1", "norm 1 output", "k", "v")
    return {
        n: size for n, size in kept.items() if n in of_all or n.startswith(("self_attn.k_proj", "self_attn.v_proj"))
    }


def temporaries(sizes: Sizes, c: Configuration, targeted: set[str]) -> dict[str, float]:
    """{moment: bytes per token} of the largest temporary tensors of a layer, beyond `layer_tensors`.

    The moments are forward, recompute (a layer's forward and backward pass in one) and backward.
    """
    return (_compiled_temporaries if c.compiled else _plain_temporaries)(sizes, c, targeted)


# --- compiled --------------------------------------------------------------------------------------------------------


def _compiled_tensors(sizes: Sizes, c: Configuration, targeted: set[str]) -> dict[str, float]:
    """The tensors in the smallest cut through the layer's graph.

    `products`: the layer keeps matrix products, attention, and what would save nothing if dropped. The backward pass
    recomputes everything between them, including dropout masks (from their seeds). It also recomputes the attention of
    cuDNN and flash-attn, because the partitioner counts only torch's own flash kernel as expensive. `all`: the layer
    also keeps each LoRA module's mask (one byte per element) and input after dropout or, without dropout, the input
    that the modules share.
    """
    h, m, kv = sizes.hidden_size, sizes.intermediate_size, sizes.kv_size
    kept: dict[str, float] = {"input": BF16 * h, "after attention": BF16 * h, "1/rms": 2 * FP32}
    kept |= {"q": BF16 * h, "k": BF16 * kv, "v": BF16 * kv, "gate": BF16 * m, "up": BF16 * m}
    kept |= {f"{module} A": BF16 * c.lora.lora_r for module in targeted}
    if c.keep == "all" or c.attention not in ("cudnn", "flash-attn"):
        kept |= {"attention": BF16 * h, "log-sum-exp": FP32 * sizes.num_attention_heads}
    if c.keep == "all":
        if c.lora.lora_dropout > 0:
            for module in targeted:
                inputs = sizes.projections()[module][0]
                kept |= {f"{module} mask": inputs, f"{module} input": BF16 * inputs}
        else:
            kept |= {"norm 1": BF16 * h} if targeted & set(QKV) else {}
            kept |= {"norm 2": BF16 * h} if targeted & set(GATE_UP) else {}
            kept |= {"product": BF16 * m} if DOWN in targeted else {}
    return kept


def _compiled_temporaries(sizes: Sizes, c: Configuration, targeted: set[str]) -> dict[str, float]:
    """Temporary tensors at SwiGLU, where inductor's one kernel has all its inputs and outputs (m wide, bf16) at once.

    Forward: the outputs of gate's and up's B, their product, and the product after dropout for LoRA, except those that
    are kept anyway. Backward: the product's gradients from down_proj and from its A; the product for A's gradient
    (unless it was kept and is freed first); the gradients of gate and up, and each again scaled for its B; and the
    layer's own gradient.
    """
    wide, hidden = BF16 * sizes.intermediate_size, BF16 * sizes.hidden_size
    down, branches = DOWN in targeted, len(targeted & set(GATE_UP))
    dropped = down and c.lora.lora_dropout > 0
    kept = down and c.keep == "all"
    forward = branches + 1 + dropped - kept
    backward = 1 + 2 + branches + (2 - 2 * kept if down else 0)
    # A kept product is not computed again, and its own memory is freed before the kernel runs.
    return {
        "forward": forward * wide,
        "recompute": backward * wide + hidden,
        "backward": backward * wide + hidden,
    }


# --- not compiled ----------------------------------------------------------------------------------------------------


def _plain_tensors(sizes: Sizes, c: Configuration, targeted: set[str]) -> dict[str, float]:
    """The tensors that autograd keeps in an uncompiled layer.

    Frozen linear modules keep no input. RMSNorm keeps its float32 copy; attention keeps rotated q and k, v, output and
    log-sum-exp; SwiGLU keeps gate, silu(gate) and up. A LoRA module keeps its dropout mask (one byte per element), the
    bf16 input of A, and A's output. Without dropout and cast, that input is the norm's output itself, which q, k and v
    share, and gate and up.
    """
    h, m, kv, heads = sizes.hidden_size, sizes.intermediate_size, sizes.kv_size, sizes.num_attention_heads
    eager = c.attention == "eager"
    kept: dict[str, float] = {"norm 1": FP32 * h + FP32, "norm 2": FP32 * h + FP32}
    repeated = c.padded or eager  # with a mask, keys and values are repeated for every head
    kept |= {"q": BF16 * h, "k": BF16 * (h if repeated else kv), "v": BF16 * (h if repeated else kv)}
    kept |= {"attention": BF16 * h, "log-sum-exp": FP32 * heads}
    if eager:
        kept["probabilities"] = (FP32 + BF16) * heads * c.clip.tokens
    kept |= {"gate": BF16 * m, "up": BF16 * m, "silu": BF16 * m}
    dropout = c.lora.lora_dropout > 0
    copies = dropout or c.casts
    for module in targeted:
        inputs = sizes.projections()[module][0]
        kept[f"{module} A"] = BF16 * c.lora.lora_r
        if dropout:
            kept[f"{module} mask"] = inputs
        if copies:
            kept[f"{module} input"] = BF16 * inputs
    if not copies:
        kept |= {"norm 1 output": BF16 * h} if targeted & set(QKV) else {}
        kept |= {"norm 2 output": BF16 * h} if targeted & set(GATE_UP) else {}
        kept |= {"product": BF16 * m} if DOWN in targeted else {}
    return kept


def _plain_temporaries(sizes: Sizes, c: Configuration, targeted: set[str]) -> dict[str, float]:
    """Temporary tensors at down_proj, whose input is the widest.

    Forward: its input and PEFT's float32 copies of it (before and after dropout), the layer's input, the hidden state
    after attention, norm 2's output (if not kept) and down_proj's result. Recompute: the same up to the last tensor
    that is needed, with the output's gradient and LoRA's part of it in place of the layer's input. Backward: the
    gradients of silu(gate), of up and of their product, or dropout's in float32; down_proj's own tensors have been
    freed by then.
    """
    h, m = sizes.hidden_size, sizes.intermediate_size
    lora, dropout = DOWN in targeted, c.lora.lora_dropout > 0
    hidden = BF16 * h
    normed = hidden if dropout or c.casts else 0
    copies = (BF16 * m + FP32 * m if c.casts else BF16 * m if dropout else 0) if lora else BF16 * m
    in_dropout = copies + FP32 * m if lora and c.casts and dropout else 0
    kept_by_down = ((BF16 * m) + (m if dropout else 0)) if lora else 0
    gradients = 3 * BF16 * m - kept_by_down
    if lora and c.casts and dropout:
        gradients = max(gradients, 2 * FP32 * m - BF16 * m)
    return {
        "forward": max(in_dropout + hidden, copies + 3 * hidden) + 2 * hidden + normed,
        "recompute": max(max(in_dropout, copies) + 4 * hidden + normed, gradients + hidden + normed),
        "backward": gradients + hidden,
    }


def encoder_temporaries(sizes: Sizes, c: Configuration) -> float:
    """Bytes of the vision tower's temporary tensors at their peak, where it rotates the keys in float32.

    In bytes per patch and unit of width: hidden 2, the norm's output 4 (autocast runs it in float32), qkv 6, float32 q
    and k 8, rotated q 4, and k's three products 12. Whisper's peak, the feed-forward of 1500 positions, is far lower.
    """
    vision = 36 * sizes.vision_embed_dim * c.batch * c.clip.patches
    audio = (3 * BF16 * sizes.encoder_ffn_dim + 3 * BF16 * sizes.d_model) * c.batch * sizes.max_source_positions
    return max(vision, audio)
