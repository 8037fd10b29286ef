"""torch's private ground: everything private in torch that the model needs is named here and nowhere else in this room.

tests/surgvqa/model/test_internals.py asserts that each name exists with the signature used here, and that each switch
still has its effect, so that a new torch fails there and not silently in training.

Dropout masks that a compiled layer computes again in its backward pass must be those of its forward pass. Inductor
draws one seed for each dropout of a graph, in one operation, and makes the masks from the seeds. Two faults of torch
give the backward pass other masks, without a word:

- With torch._functorch.config.aggressive_recomputation on, the partitioner bans the recomputation of some operations,
  and drawing the seeds is not among them: the backward pass may draw new ones (torch 2.11 and 2.13, any device; it
  happens in graphs with up to four dropouts, and always within a checkpoint; tests/surgvqa/model/test_layers.py).
- From torch 2.13 on, on CUDA, a one-dimensional kernel makes other numbers from a seed than one with a reduction, such
  as a norm's (https://github.com/pytorch/pytorch/issues/198333).
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import CheckpointPolicy

SEEDS = ("prims::inductor_seed", "prims::inductor_seeds")


class KeepSeeds(CustomGraphPass):
    """Marks the drawing of seeds, 8 bytes each, as kept for the backward pass. Runs before the partitioner."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target.name() in SEEDS:
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> bytes:
        """Part of the key under which torch caches what it compiled; it changes with this file."""
        return get_hash_for_files((__file__,))


def keep_dropout_seeds() -> None:
    """Works around both faults for all that is compiled from now on. Idempotent."""
    import torch._inductor.config
    from torch._inductor.codegen.triton import TritonOverrides

    torch._inductor.config.joint_custom_post_pass = KeepSeeds()
    if hasattr(TritonOverrides, "_can_use_4x_random"):  # since 2.13
        setattr(TritonOverrides, "_can_use_4x_random", staticmethod(lambda: False))  # noqa: B010


def configure_compiler(*, recompute_cheap: bool) -> None:
    """Sets torch.compile up for layers that are compiled one by one. For the whole process.

    `recompute_cheap`: only matrix products and attention are kept for the backward pass.
    """
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.config.suppress_errors = True  # fall back to eager, with torch's own warning
    # One graph serves all layers, whose parameters are its inputs. But transformers' flash-attn code reads the layer's
    # number: treated as a constant, it would need one graph a layer, and past recompile_limit layers run uncompiled.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    # 8 by default, too few for all the kinds: a layer recomputes or not, is the first (whose input needs no gradient)
    # or not, runs in training or in evaluation, with rows of the first length or of any other.
    torch._dynamo.config.recompile_limit = 32
    torch._functorch.config.aggressive_recomputation = recompute_cheap
    keep_dropout_seeds()


def start_compiler() -> None:
    """Starts inductor's worker processes. They take seconds to import torch; until they are up, kernels are compiled
    one after another in this process."""
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()


def compilations() -> dict[str, int]:
    """What torch.compile has done so far in this process.

    graphs: compiled; recompiles: those of them that were needed because an earlier one did not fit, for instance
    another length; graph_breaks: places within a layer where it goes on in plain Python; compile_failures: what it gave
    up, after an error or at recompile_limit, and now runs uncompiled.
    """
    import torch._dynamo.utils as dynamo

    attempts = dynamo.get_compilation_metrics()
    return {
        "graphs": dynamo.counters["stats"]["unique_graphs"],
        "recompiles": sum(bool(attempt.recompile_reason) and not attempt.fail_type for attempt in attempts),
        "graph_breaks": sum(dynamo.counters["graph_break"].values()),
        "compile_failures": sum(bool(attempt.fail_type) for attempt in attempts),
    }


def sdpa_takes_cudnn(heads: int, kv_heads: int, width: int, device: torch.device) -> bool:
    """Whether scaled_dot_product_attention picks cuDNN's kernel for bf16 heads of this width on a GPU."""
    q, k, v = (
        torch.zeros(1, n, 256, width, dtype=torch.bfloat16, device=device, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    chosen: Any = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True)
    return bool(chosen == SDPBackend.CUDNN_ATTENTION.value)
