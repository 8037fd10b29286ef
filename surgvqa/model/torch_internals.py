"""torch's private names that we rely on. In this package, they are used only here.

tests/surgvqa/model/test_internals.py asserts that each name exists with the signature used here, and that each switch
still works, so that a new torch fails there and not silently in training.

A compiled layer that computes dropout masks again in its backward pass must get the masks of its forward pass. Inductor
draws one seed for each dropout of a graph, in one operation, and computes the masks from the seeds. Two bugs in torch
silently give the backward pass other masks:

- With torch._functorch.config.aggressive_recomputation, the partitioner bans the recomputation of some operations, but
  not of drawing seeds, so the backward pass may draw new ones (torch 2.11 and 2.13, any device; in graphs with up to
  four dropouts, and always with recomputing layers; tests/surgvqa/model/test_layers.py).
- From torch 2.13 on, on CUDA, a one-dimensional kernel computes other numbers from a seed than one with a reduction,
  such as a norm (https://github.com/pytorch/pytorch/issues/198333).
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import CheckpointPolicy

SEEDS = ("prims::inductor_seed", "prims::inductor_seeds")


class KeepSeeds(CustomGraphPass):
    """A pass, run before the partitioner, that keeps the drawn seeds (8 bytes each) for the backward pass."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target.name() in SEEDS:
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> bytes:
        """Part of the key of torch's compilation cache; it changes with this file."""
        return get_hash_for_files((__file__,))


def keep_dropout_seeds() -> None:
    """Works around both bugs in everything that is compiled from now on. Idempotent."""
    import torch._inductor.config
    from torch._inductor.codegen.triton import TritonOverrides

    torch._inductor.config.joint_custom_post_pass = KeepSeeds()
    if hasattr(TritonOverrides, "_can_use_4x_random"):  # since 2.13
        setattr(TritonOverrides, "_can_use_4x_random", staticmethod(lambda: False))  # noqa: B010


def configure_compiler(*, recompute_cheap: bool) -> None:
    """Configures torch.compile in this process for layers that are compiled one by one.

    `recompute_cheap`: keep only matrix products and attention for the backward pass.
    """
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.config.suppress_errors = True  # fall back to eager, with torch's own warning
    # All layers share one graph, which takes their parameters as inputs. But transformers' flash-attn code reads the
    # layer's number. As a constant it would need one graph per layer, and beyond recompile_limit layers run uncompiled.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    # The default of 8 is too low for all combinations: a layer recomputes or not, is the first (whose input needs no
    # gradient) or not, runs in training or in evaluation, with rows of the first length or of any other.
    torch._dynamo.config.recompile_limit = 32
    torch._functorch.config.aggressive_recomputation = recompute_cheap
    keep_dropout_seeds()
    same_keys_in_all_processes()


def same_keys_in_all_processes() -> None:
    """Makes the keys of torch's compilation cache independent of the order in which modules were imported.

    A key is the hash of a pickle. It contains torch.contiguous_format, for which pickle searches all modules, in the
    order of their import, and names the first that has an attribute `torch`.
    """
    copyreg.pickle(torch.memory_format, _pickled_memory_format)


def _pickled_memory_format(found: torch.memory_format) -> tuple[Any, ...]:
    return _memory_format, (str(found).removeprefix("torch."),)


def _memory_format(name: str) -> torch.memory_format:
    found: torch.memory_format = getattr(torch, name)
    return found


def fused(function: Callable[..., Any]) -> Any:
    """An elementwise `function` as one kernel for tensors of any size; uncompiled if it cannot be compiled."""
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True
    return torch.compile(function, dynamic=True)


def start_compiler() -> None:
    """Starts inductor's worker processes, which take seconds to import torch.

    Until they are ready, kernels are compiled one after another in this process.
    """
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()


def compilations() -> dict[str, int]:
    """Counts of torch.compile's work in this process so far.

    graphs: compiled graphs. recompiles: those compiled because an earlier one did not apply, for instance to another
    length. graph_breaks: places in a layer where plain Python runs. compile_failures: code that runs uncompiled after
    an error or because of recompile_limit. cached_graphs: graphs that came out of torch's cache on disk.
    """
    import torch._dynamo.utils as dynamo

    attempts = dynamo.get_compilation_metrics()
    return {
        "graphs": dynamo.counters["stats"]["unique_graphs"],
        "recompiles": sum(bool(attempt.recompile_reason) and not attempt.fail_type for attempt in attempts),
        "graph_breaks": sum(dynamo.counters["graph_break"].values()),
        "compile_failures": sum(bool(attempt.fail_type) for attempt in attempts),
        "cached_graphs": dynamo.counters["aot_autograd"]["autograd_cache_hit"],
    }


def sdpa_takes_cudnn(heads: int, kv_heads: int, width: int, device: torch.device) -> bool:
    """Whether scaled_dot_product_attention picks cuDNN's kernel for bf16 heads of this width on a GPU."""
    q, k, v = (
        torch.zeros(1, n, 256, width, dtype=torch.bfloat16, device=device, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    chosen: Any = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True)
    return bool(chosen == SDPBackend.CUDNN_ATTENTION.value)


def compiler_cache_dir() -> Path:
    """The cache folder of torch.compile: TORCHINDUCTOR_CACHE_DIR, or a folder of the user in /tmp."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def begin_divided(root: Any) -> None:
    """Makes `root` the root of the FSDP2 modules in it, as its first forward pass would."""
    root._get_fsdp_state()._lazy_init()


def reset_divided(root: Any) -> None:
    """Frees what FSDP2 has gathered in a pass that was interrupted, and makes its modules ready for the next one.

    Since 2.13 torch has `reset_iter_state` for that. This does the same with what 2.11 has too.
    """
    state = root._get_fsdp_state()
    state._comm_ctx.all_gather_state = None
    state._root_post_backward_final_callback()
    state._state_ctx.iter_forward_root = None
