"""Activations against a trace of upstream's own layers and of torch's partitioner (fake tensors: no weights)."""

from __future__ import annotations

import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest

from surgvqa.config.options import LoraOptions
from surgvqa.memory import activations, predict
from surgvqa.memory.clip import Clip
from surgvqa.model.sizes import Sizes

REAL = Sizes()


# --- the activations, traced -----------------------------------------------------------------------------------------


@contextmanager
def traced():
    """Counts the bytes of live storages, in torch's fake-tensor mode: shapes and dtypes are real, data is not."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.weak import WeakIdKeyDictionary

    class Tracer(TorchDispatchMode):
        live = peak = 0

        def __init__(self):
            super().__init__()
            self.seen = WeakIdKeyDictionary()

        def count(self, tensor):
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                self.seen[storage] = True
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage.nbytes())

        def free(self, nbytes):
            self.live -= nbytes

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            torch.utils._pytree.tree_map_only(torch.Tensor, self.count, result)
            return result

    with FakeTensorMode(allow_non_fake_inputs=True), Tracer() as tracer:
        yield tracer


def trace_step(sizes, c, monkeypatch):
    """Most bytes of activations in a micro step of upstream's text model with PEFT's LoRA, after a first micro step."""
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import Qwen2VLTextConfig
    from transformers.initialization import no_init_weights
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

    from surgvqa.model.last_layer import reading_at

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if attn_mask is not None:  # of the last layer, for the few positions that are read
            return torch.softmax(q @ k.mT, -1) @ v
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]

    def dropout(x, p=0.5, training=True, inplace=False):
        return torch.ops.aten.native_dropout(x, p, training)[0] if training and p else x

    # What a GPU runs, on the CPU's fake tensors: the flash kernel, and dropout with a mask of one byte.
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(nn.Module, "to", lambda self, *a, **k: self)  # fake parameters cannot be swapped
    config = Qwen2VLTextConfig(
        hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers, num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads, vocab_size=sizes.vocab_size,
        rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        layer_types=["full_attention"] * sizes.num_hidden_layers,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    tokens = c.clip.tokens
    labels = c.clip.answer_tokens if c.supervised_tokens is None else c.supervised_tokens
    default = torch.get_default_dtype()
    try:
        with traced() as tracer:
            torch.set_default_dtype(torch.bfloat16)
            with no_init_weights():
                lm, head = Qwen2VLTextModel(config), nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)
            lm.requires_grad_(False)
            head.requires_grad_(False)
            torch.set_default_dtype(torch.float32 if c.adapter_bytes == 4 else torch.bfloat16)
            wrapped = get_peft_model(
                lm,
                LoraConfig(r=c.lora.lora_r, lora_dropout=c.lora.lora_dropout, target_modules=r".*_proj"),
                autocast_adapter_dtype=False,
            )
            torch.set_default_dtype(torch.float32)
            for module in wrapped.modules():
                if hasattr(module, "cast_input_dtype_enabled"):
                    module.cast_input_dtype_enabled = c.casts_lora_inputs
            if c.recomputing(sizes):
                lm.gradient_checkpointing_enable({"use_reentrant": False})
            for number, layer in enumerate(lm.layers):
                layer.gradient_checkpointing = number < c.recomputing(sizes)
            wrapped.train()
            base = torch.empty(c.batch, tokens, sizes.hidden_size, dtype=torch.bfloat16)
            projector = torch.zeros((), dtype=torch.bfloat16, requires_grad=True)
            positions = torch.zeros(3, c.batch, tokens, dtype=torch.long)
            targets = torch.zeros(c.batch * labels, dtype=torch.long)

            def micro_step():
                read_at = torch.arange(tokens - labels, tokens) if c.reads_few else None
                with torch.autocast("cpu", torch.bfloat16), reading_at(lm.layers, read_at):
                    hidden = lm(inputs_embeds=base + projector, position_ids=positions).last_hidden_state
                    logits = head(hidden[:, -labels:].flatten(0, 1))
                    loss = F.cross_entropy(logits.float(), targets, reduction="sum")
                return loss

            micro_step().backward()
            start = tracer.peak = tracer.live
            micro_step().backward()
            return tracer.peak - start
    finally:
        torch.set_default_dtype(default)


ACTIVATIONS = {"checkpoints", "activations kept", "recomputed layer", "layer temporaries", "logits and loss",
               "bf16 copies of adapters"}  # fmt: skip


@pytest.mark.model
@pytest.mark.parametrize(
    ("recomputing", "dropout", "casts", "adapter_bytes", "labels", "batch"),
    [
        (3, 0.05, True, 4, 12, 1),
        (3, 0.05, False, 4, 12, 1),
        (3, 0.05, True, 2, 12, 1),
        (3, 0.0, True, 4, 12, 1),
        (3, 0.0, False, 4, 12, 1),
        (3, 0.05, True, 4, 1000, 1),
        (3, 0.05, False, 4, 700, 2),
        (3, 0.05, False, 4, 12, 2),
        (1, 0.05, True, 4, 12, 1),
        (1, 0.05, False, 4, 12, 1),
        (1, 0.0, False, 2, 12, 1),
        (0, 0.05, True, 4, 12, 1),
        (0, 0.05, False, 4, 12, 2),
        (0, 0.0, False, 4, 12, 1),
    ],
)
def test_activations_are_those_of_upstreams_layers(
    recomputing, dropout, casts, adapter_bytes, labels, batch, monkeypatch
):
    sizes = replace(REAL, num_hidden_layers=3)
    c = predict.Configuration(
        clip=Clip(0, (0, 0), 0, 1400, 588, 12),
        batch=batch,
        lora=LoraOptions(lora_dropout=dropout),
        adapter_bytes=adapter_bytes,
        casts_lora_inputs=casts,
        checkpointed_layers=recomputing,
        supervised_tokens=labels,
        last_layer_whole=labels > 100,
        cached_features=True,
        expandable_segments=True,
    )
    found = predict.predict(sizes, c)
    predicted = sum(x.bytes for x in found.components if x.name in ACTIVATIONS)
    measured = trace_step(sizes, c, monkeypatch)
    assert predicted / measured == pytest.approx(1, abs=0.015), (
        f"{predicted / 1e6:.0f} MB, traced {measured / 1e6:.0f} MB"
    )


# --- compiled layers: what torch's partitioner keeps ------------------------------------------------------------------


def partition(sizes, c, monkeypatch):
    """(bytes a token, bytes of parameters' copies) that a compiled layer of upstream keeps for its backward pass: from
    the graph to the cut, with torch.compile's own passes; nothing is computed."""
    import torch
    import torch._functorch.config
    import torch.nn.functional as F
    import torch.utils._pytree as pytree
    from peft import LoraConfig, get_peft_model
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.utils import detect_fake_mode
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V
    from transformers import Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

    from surgvqa.model.peft_internals import without_input_casts

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if c.attention == "cudnn":
            op = torch.ops.aten._scaled_dot_product_cudnn_attention
            return op(q, k, v, None, True, dropout_p, is_causal, False, scale=scale)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]

    # a GPU's kernels, which cannot run here but can be traced
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(F, "dropout", lambda x, p, training, *_: torch.ops.aten.native_dropout(x, p, training)[0])
    config = Qwen2VLTextConfig(
        hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size, num_hidden_layers=1,
        num_attention_heads=sizes.num_attention_heads, num_key_value_heads=sizes.num_key_value_heads, vocab_size=8,
        rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        layer_types=["full_attention"], bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    lm = Qwen2VLTextModel(config).to(torch.bfloat16).requires_grad_(False)
    lora = LoraConfig(r=c.lora.lora_r, lora_dropout=c.lora.lora_dropout, target_modules=r".*_proj")
    wrapped = get_peft_model(lm, lora, autocast_adapter_dtype=True).train()
    without_input_casts(wrapped)
    kept = Counter()

    class Partitioned(Exception):
        pass

    def cut(joint, inputs, *, compiler=None, **keywords):
        with V.set_fake_mode(detect_fake_mode(pytree.tree_leaves(inputs))):
            joint_graph_passes(joint)
        forward, _ = min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **keywords)
        (results,) = (node.args[0] for node in forward.graph.nodes if node.op == "output")
        for node in results[keywords["num_fwd_outputs"] :]:
            value = node.meta["val"]
            # inputs of the graph are parameters, which are there anyway, the hidden states, and cosines for all layers
            if node.op != "placeholder" or value.shape == hidden.shape:
                kept["a token" if c.tokens in value.shape else "copies"] += value.nbytes
        raise Partitioned

    def never(graph, inputs):
        raise AssertionError("nothing is compiled here")

    hidden = torch.zeros(1, c.tokens, sizes.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    cosines = lm.rotary_emb(hidden, torch.zeros(3, 1, c.tokens, dtype=torch.long))
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=never, bw_compiler=never, partition_fn=cut, decompositions=select_decomp_table())
    lm.layers[0].compile(backend=backend)
    with (
        torch._functorch.config.patch(aggressive_recomputation=c.keep == "products"),
        torch._dynamo.config.patch(suppress_errors=False),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(Exception, match="Partitioned"),
    ):
        lm.layers[0](hidden, position_embeddings=cosines, use_cache=False)
    torch._dynamo.reset()
    return kept["a token"] / c.tokens, kept["copies"]


@pytest.mark.model
@pytest.mark.parametrize("attention", ["flash", "cudnn"])
@pytest.mark.parametrize(("keep", "dropout"), [("all", 0.05), ("all", 0.0), ("products", 0.05), ("products", 0.0)])
def test_compiled_layers_keep_what_torchs_partitioner_keeps(keep, dropout, attention, monkeypatch):
    """The real model's proportions at a quarter of its width."""
    sizes = replace(REAL, hidden_size=896, num_attention_heads=7, num_key_value_heads=1, intermediate_size=4736)
    lora = LoraOptions(lora_r=16, lora_dropout=dropout)
    c = predict.Configuration(
        clip=Clip(0, (0, 0), 0, 900, 48, 12), lora=lora, compiled=True, keep=keep, attention=attention
    )
    predicted = sum(activations.layer_tensors(sizes, c, set(sizes.projections())).values())
    found, copies = partition(sizes, c, monkeypatch)
    assert predicted == pytest.approx(found, rel=0.001)
    expected = 2 * sum(16 * sum(shape) for shape in sizes.projections().values()) if keep == "all" else 0
    assert copies == pytest.approx(expected, abs=1000)  # the adapters in bf16; and seeds
