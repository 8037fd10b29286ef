"""The memory prediction: sizes against headers, grids against upstream, activations against a trace of upstream's own
layers (no weights: fake tensors), totals against what was measured on an H100, and the budget command."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgvqa.cli import main
from surgvqa.config.options import BudgetOptions, DataOptions, LoraOptions, TrainOptions
from surgvqa.errors import UsageError
from surgvqa.machine import gpu
from surgvqa.memory import activations, fit, predict
from surgvqa.memory.clip import MAX_PIXELS, MIN_PIXELS, Clip, clip_of, patch_grid, thumbnail_size
from surgvqa.model.sizes import Sizes, checkpoint_sizes

REAL = Sizes()


def plain(**overrides):
    """The old way of running: encoders in each step, no compilation, PEFT's casts; 8 frames at 512 px."""
    old = dict(cached_features=False, encoders_resident=True, compiled=False, casts_lora_inputs=True)
    return predict.configuration(REAL, DataOptions(), **(old | overrides))


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_the_real_model_has_8_93_billion_parameters():
    assert sum(map(sum, REAL.weights().values())) == 8_932_932_096  # counted on the GPU: 8.933 B
    assert sum(predict.adapter_tensors(REAL, LoraOptions())) == 166_068_224  # counted by PEFT: 166.1 M


@pytest.mark.parametrize(
    ("frames", "px", "grid", "tokens_a_frame"),
    [(8, 512, (32, 36), 288), (6, 384, (24, 28), 168), (8, 768, (48, 54), 648)],
)
def test_a_clip_of_the_real_dataset(frames, px, grid, tokens_a_frame):
    clip = clip_of(REAL, DataOptions(num_frames=frames, image_size=px))
    assert clip.grid == grid
    assert clip.image_tokens == frames * tokens_a_frame
    assert clip.audio_tokens == 1500


def test_a_written_question_takes_tokens():
    assert clip_of(REAL, DataOptions(input_mode="audio_text")).tokens > clip_of(REAL, DataOptions()).tokens


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 3000), st.integers(2, 3000), st.integers(28, 1500))
def test_thumbnail_size_is_pillows(width, height, longest):
    image = pytest.importorskip("PIL.Image").new("1", (width, height))
    image.thumbnail((longest, longest))
    assert image.size == thumbnail_size(width, height, longest)


@pytest.mark.model
@settings(deadline=None, max_examples=50)
@given(st.integers(28, 3000), st.integers(28, 3000))
def test_patch_grid_is_upstreams(width, height):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(width, height) / min(width, height) > 200:
        return
    rows, columns = smart_resize(height, width, 28, MIN_PIXELS, MAX_PIXELS)
    assert patch_grid(width, height, REAL) == (rows // 14, columns // 14)


def write_checkpoint(folder, sizes, without=""):
    """A checkpoint's headers and config with holes for the data."""
    h, e, d, kv = sizes.hidden_size, sizes.vision_embed_dim, sizes.d_model, sizes.kv_size
    shapes = {
        "model.embed_tokens.weight": (sizes.vocab_size, h),
        "lm_head.weight": (sizes.vocab_size, h),
        "model.norm.weight": (h,),
        "visual.patch_embed.proj.weight": (e, 3, 2, 14, 14),
        "visual.blocks.0.mlp.fc1.weight": (4 * e, e),
        "audio_encoder.conv1.weight": (d, sizes.num_mel_bins, 3),
        "audio_encoder.embed_positions.weight": (sizes.max_source_positions, d),
        "audio_encoder.layers.0.fc1.weight": (sizes.encoder_ffn_dim, d),
        "audio_projector.weight": (h, d),
    }
    for layer in range(sizes.num_hidden_layers):
        for name, (inputs, outputs) in sizes.projections().items():
            shapes[f"model.layers.{layer}.{name}.weight"] = (outputs, inputs)
        shapes[f"model.layers.{layer}.self_attn.k_proj.bias"] = (kv,)
    header, offset = {}, 0
    for name, shape in shapes.items():
        if without and name.startswith(without):
            continue
        count = 2
        for n in shape:
            count *= n
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)  # sparse
    config = {"num_attention_heads": sizes.num_attention_heads, "num_key_value_heads": sizes.num_key_value_heads}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SMALL = replace(REAL, num_hidden_layers=2, vision_depth=1, encoder_layers=1, vocab_size=2048, hidden_size=256,
                num_attention_heads=4, num_key_value_heads=2, intermediate_size=512, vision_embed_dim=160,
                max_source_positions=100)  # fmt: skip


def test_sizes_come_from_the_headers(tmp_path):
    sizes, weights = checkpoint_sizes(write_checkpoint(tmp_path / "c", SMALL))
    assert sizes == SMALL
    assert weights["head"] == weights["embeddings"] == [2048 * 256]
    assert sum(weights["projector"]) == 256 * SMALL.d_model


@pytest.mark.parametrize("without", ["audio_encoder", "visual", "model.embed_tokens"])
def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path, without, capsys):
    folder = write_checkpoint(tmp_path / "c", SMALL, without)
    assert main.main(["budget", "--model_name_or_path", str(folder)]) == 2
    assert str(folder) in capsys.readouterr().err


# --- the sum ---------------------------------------------------------------------------------------------------------


CACHED = {"cached_features": True, "encoders_resident": False, "casts_lora_inputs": False, "attention": "cudnn"}
COMPILED = {"compiled": True, **CACHED}


@pytest.mark.parametrize(
    ("overrides", "measured_gb"),
    [  # docs/benchmarks.md and /work: design/measured.md, H100, torch 2.11: 8 frames, 512 px, logits of the answer only
        ({}, 22.7),
        (CACHED, 19.41),
        (COMPILED | {"keep": "all"}, 19.50),
        (COMPILED | {"keep": "all", "checkpointed_layers": 20}, 25.6),
        (COMPILED | {"keep": "all", "checkpointed_layers": 0}, 43.1),
        (COMPILED | {"keep": "products", "checkpointed_layers": 0}, 29.05),
    ],
)
def test_the_peak_is_within_one_percent_and_a_half_of_what_was_measured(overrides, measured_gb):
    """Those runs had 3,880 tokens, not padded to 3,904, their inputs once, not for each micro step, and the token
    embeddings on the GPU."""
    clip = Clip(8, (32, 36), 2304, 1500, 60, 16)
    predicted = (
        predict.predict(REAL, plain(**overrides, clip=clip)).predicted_peak_gb
        + 2 * REAL.weights()["embeddings"][0] / 1e9
    )
    assert predicted / measured_gb == pytest.approx(1, abs=0.015)


def test_what_each_choice_saves_is_what_was_measured_without_it():
    """H100, docs/benchmarks.md: logits everywhere 26.61 GB beside 21.45, 32-bit AdamW 22.40; as shipped no layer
    recomputes at 28.11, all do at 18.23."""
    saved = dict(fit.choices(REAL, plain(casts_lora_inputs=True)))
    assert saved["logits at the answer only"] == pytest.approx(26.61 - 21.45, abs=0.1)
    assert saved["8-bit AdamW"] == pytest.approx(22.40 - 21.45, abs=0.1)
    assert "frames and questions encoded once, the encoders off the GPU" not in saved
    shipped = dict(fit.choices(REAL, plain(**COMPILED, keep="products", checkpointed_layers=0)))
    assert shipped["28 of 28 layers do not recompute, a third less to compute in each"] == pytest.approx(-9.88, abs=0.1)
    assert shipped["frames and questions encoded once, the encoders off the GPU"] > 2.6  # their weights
    assert shipped["compiled layers keep only matrix products"] > 10


def test_the_components_add_up_to_the_fullest_phase():
    for count in (None, 14, 0):
        found = predict.predict(REAL, plain(checkpointed_layers=count))
        assert found.peak_bytes == pytest.approx(max(found.phases.values()))
        assert found.phases[found.phase] == max(found.phases.values())
        assert found.predicted_peak_gb < found.predicted_reserved_gb < found.predicted_driver_gb


def test_more_of_anything_takes_more_memory():
    def peak(options=None, **overrides):
        return predict.predict(REAL, predict.configuration(REAL, options or DataOptions(), **overrides)).peak_bytes

    assert peak(DataOptions(num_frames=4)) < peak(DataOptions(num_frames=6)) < peak(DataOptions(num_frames=8))
    assert peak(DataOptions(image_size=384)) < peak(DataOptions(image_size=512)) < peak(DataOptions(image_size=768))
    assert peak() < peak(batch=2) < peak(batch=4)
    assert peak() < peak(cached_features=False, encoders_resident=True)
    assert peak() < peak(eight_bit=False)
    assert peak(accumulation=1) < peak(accumulation=4)
    assert peak() < peak(supervised_tokens=3000)
    counts = [peak(checkpointed_layers=n, keep="all") for n in range(27, -1, -1)]  # the first one kept costs nothing
    assert counts == sorted(counts)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 16), st.integers(56, 1024), st.integers(1, 4), st.integers(0, 28), st.booleans(), st.booleans(),
    st.sampled_from((2, 4)), st.sampled_from((0.0, 0.05)), st.integers(1, 4),
)  # fmt: skip
def test_no_configuration_breaks_it(frames, px, batch, kept, casts, compiled, adapter_bytes, dropout, accumulation):
    options = TrainOptions(
        model_name_or_path="", train_data_path="", frames_dir="", audio_dir="", num_frames=frames, image_size=px,
        lora_dropout=dropout,
    )  # fmt: skip
    c = predict.configuration(
        REAL, options, batch=batch, checkpointed_layers=kept, casts_lora_inputs=casts, compiled=compiled,
        adapter_bytes=adapter_bytes, accumulation=accumulation,
    )  # fmt: skip
    found = predict.predict(REAL, c)
    assert all(x.bytes >= 0 and x.peak_bytes >= x.bytes for x in found.components)
    assert found.peak_bytes > 15e9


def test_fit_takes_the_fewest_recomputing_layers_with_a_margin():
    found = fit.fit(REAL, plain(), 28.5)
    count = found.configuration.checkpointed_layers
    assert 0 < count < 28
    assert found.predicted_peak_gb <= 28.5 * (1 - fit.MARGIN)
    assert predict.predict(REAL, plain(checkpointed_layers=count - 1)).predicted_peak_gb > 28.5 * (1 - fit.MARGIN)
    assert fit.fit(REAL, plain(), 20) is None


@pytest.mark.parametrize("attention", ["flash", "cudnn"])
def test_the_default_configuration_fits_and_spends_the_spare_on_speed(attention):
    """On a 40 GB card's budget next to no layer recomputes and only products are kept; with more room all are."""
    c = predict.configuration(REAL, DataOptions(), attention=attention)
    found = fit.fit(REAL, c, 28.5)
    assert 27.5 < found.predicted_peak_gb < 28.5 * (1 - fit.MARGIN)
    assert found.configuration.keep == "products" and found.configuration.checkpointed_layers <= 3
    assert fit.fit(REAL, c, 28.5, capped=True).predicted_reserved_gb < 28.5 * (1 - fit.MARGIN)
    roomy = fit.fit(REAL, c, 60).configuration
    assert (roomy.keep, roomy.checkpointed_layers) == ("all", 0)
    between = fit.fit(REAL, c, 35).configuration
    assert (between.keep, between.checkpointed_layers) == ("products", 0)
    assert fit.fit(REAL, replace(c, keep="all"), 35).configuration.checkpointed_layers > 0


@pytest.mark.parametrize("pattern", ["(", "model.layers.0.nothing"])
def test_a_pattern_that_matches_nothing_is_refused(pattern):
    with pytest.raises(UsageError, match="lora_target_modules"):
        predict.predict_options(BudgetOptions(lora_target_modules=pattern))


def test_allocator_blocks():
    mib = 2**20
    assert activations.block(1) == 512
    assert activations.block(3 * mib) == 3 * mib
    assert activations.block(129.5 * mib) == 130 * mib  # the rest of the segment is too small to be split off
    assert activations.block(128.5 * mib) == 128.5 * mib
    assert activations.block(129.5 * mib, expandable=True) == 129.5 * mib


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

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert attn_mask is None
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
                with torch.autocast("cpu", torch.bfloat16):
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


# --- the command -----------------------------------------------------------------------------------------------------


def test_budget_says_yes_and_no(capsys):
    assert main.main(["budget", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] is True
    assert document["predicted_peak_gb"] < document["budget_gb"] == 28.5
    allocated = [c["gb"] for c in document["components"] if c["group"] in ("weights", "training", "activations")]
    assert sum(allocated) == pytest.approx(document["predicted_peak_gb"])
    assert document["sequence_tokens"] == 3886
    assert main.main(["budget", "--json", "--budget_gb", "19", "--gradient_checkpointing", "false"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_budget_drawn_fits_80_columns_and_says_what_to_change(capsys):
    assert main.main(["budget", "--gradient_checkpointing", "false"]) == 1
    drawn = capsys.readouterr().out
    assert max(map(len, drawn.splitlines())) <= 80
    assert "does not fit" in drawn
    assert "recompute" in drawn
    assert "language model" in drawn
    assert "…" not in drawn
    assert ("on a GPU; this machine has none" in " ".join(drawn.split())) == (not gpu.any_gpu())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--num_frames", "0"],
        ["--budget_gb", "0"],
        ["--image_size", "5"],
        ["--lora_dropout", "1"],
        ["--gradient_accumulation_steps", "0"],
        ["--checkpointed_layers", "-1"],
        ["--checkpointed_layers", "29"],  # the real model has 28
    ],
)
def test_budget_refuses_numbers_that_mean_nothing(arguments, capsys):
    assert main.main(["budget", *arguments]) == 2
    assert arguments[0].strip("-") in capsys.readouterr().err


def test_presets_show_their_peaks(capsys):
    assert main.main(["presets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["presets"]
    peaks = [p["predicted_peak_gb"] for p in listed if p["rung"] is not None]
    assert peaks == sorted(peaks, reverse=True)
    assert all(p["fits"] for p in listed)


@pytest.mark.model
def test_rows_are_padded_as_the_trainer_pads():
    from surgvqa.training import recipe

    assert recipe.LENGTH_BUCKET == activations.LENGTH_BUCKET
