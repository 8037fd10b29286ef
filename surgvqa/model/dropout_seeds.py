"""Dropout masks that a compiled layer makes again in its backward pass are those of its forward pass.

Inductor draws a seed for each dropout of a graph, in one operation, and makes the masks from the seeds. Two faults of
torch give the backward pass other masks, without a word:

- Where torch._functorch.config.aggressive_recomputation is on, the partitioner forbids computing some operations again,
  and the seeds' is not among them: the backward pass may draw new ones (torch 2.11 and 2.13, any device; it does so
  where a graph has up to four dropouts, and within a checkpoint always; tests/surgvqa/model/test_layers.py).
- From torch 2.13 on, on CUDA, a one-dimensional kernel makes other numbers of a seed than one with a reduction, such as
  a norm's (https://github.com/pytorch/pytorch/issues/198333).
"""

from __future__ import annotations

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
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


def keep() -> None:
    """Mends both for all that is compiled from now on. Idempotent."""
    import torch._inductor.config
    from torch._inductor.codegen.triton import TritonOverrides

    torch._inductor.config.joint_custom_post_pass = KeepSeeds()
    if hasattr(TritonOverrides, "_can_use_4x_random"):
        TritonOverrides._can_use_4x_random = staticmethod(lambda: False)
