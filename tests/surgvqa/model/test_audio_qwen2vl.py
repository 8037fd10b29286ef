"""The model and its adapters on a tiny random checkpoint of the real architecture, in the author's format."""

import functools
import json
import sys
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_model import (  # noqa: E402
    AUDIO,
    CONFIG,
    POSITIONS,
    WHISPER,
    built,
    close,
    collate,
    generate,
    load,
    packed,
    prompt_of,
    random_tensors,
    sample,
    write_checkpoint,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import modeling_flash_attention_utils  # noqa: E402

from surgvqa.checkpoint.names import to_old_name  # noqa: E402
from surgvqa.config.options import LORA_TARGETS, LoraOptions  # noqa: E402
from surgvqa.errors import SurgvqaError, UsageError  # noqa: E402
from surgvqa.model import adapter, layers  # noqa: E402
from surgvqa.model.adapter import add_lora, load_adapter, save_adapter  # noqa: E402
from surgvqa.model.device import choose_attention  # noqa: E402
from surgvqa.model.loading import load_model  # noqa: E402
from surgvqa.model.torch_internals import compilations  # noqa: E402

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def model(checkpoint):
    return load(checkpoint)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_loaded_model_holds_the_files_tensors_frozen_and_in_eval_mode(checkpoint, model):
    written = load_file(checkpoint / "model.safetensors")
    held = {to_old_name(name): tensor for name, tensor in model.state_dict().items()}
    assert held.keys() == written.keys()
    assert all(torch.equal(held[name], written[name]) for name in written)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.config.text_config.num_hidden_layers == 2
    assert model.audio_encoder.config.encoder_attention_heads == 2


def test_dtype_is_the_one_asked_for(checkpoint):
    assert {p.dtype for p in load(checkpoint, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_checkpoint_saved_by_transformers_loads_again_and_keeps_the_old_names(checkpoint, model, tmp_path):
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(checkpoint / "model.safetensors").keys()
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())  # nested, as transformers 5 writes it
    again = load(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_new_names_load_as_well(checkpoint, model, tmp_path):
    assert load(write_checkpoint(tmp_path, model.state_dict())).state_dict().keys() == model.state_dict().keys()


def test_whisper_sizes_come_from_config_json_when_they_stand_there(tmp_path):
    four_heads = load(write_checkpoint(tmp_path, audio_encoder_config=WHISPER | {"encoder_attention_heads": 4}))
    assert four_heads.audio_encoder.layers[0].self_attn.num_heads == 4


def test_tied_head_is_the_embedding(tmp_path):
    tensors = random_tensors()
    del tensors["lm_head.weight"]
    model = load(write_checkpoint(tmp_path, tensors, tie_word_embeddings=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_a_projector_bias_is_used_when_the_checkpoint_has_one(tmp_path):
    tensors = random_tensors(projector_bias=True)
    model = load(write_checkpoint(tmp_path, tensors))
    assert torch.equal(model.audio_projector.bias, tensors["audio_projector.bias"])


@pytest.mark.parametrize(
    "spoil, text",
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "not in the checkpoint: model.layers.1.mlp.up"),
        (lambda t: t.pop("lm_head.weight"), "not in the checkpoint: lm_head.weight;"),
        (lambda t: t.update({"stray": torch.zeros(1)}), "not in the model: stray;"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "norm.weight is [3] but config.json calls for"),
        (lambda t: t.pop("audio_encoder.embed_positions.weight"), "no Whisper encoder (audio_encoder.*)"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_an_error_of_one_line(tmp_path, spoil, text):
    tensors = random_tensors()
    spoil(tensors)
    with pytest.raises(SurgvqaError) as error:
        load(write_checkpoint(tmp_path, tensors))
    assert text in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"vocab_size": "many"}, {"hidden_size": None}])
def test_a_config_that_is_not_ours_is_a_usage_error(tmp_path, config):
    with pytest.raises(UsageError, match=r"config\.json") as error:
        load(write_checkpoint(tmp_path, **config))
    assert "\n" not in str(error.value)


# --- forward ---------------------------------------------------------------------------------------------------------


def test_answer_only_loss_equals_the_full_computation(model):
    batch = collate([sample(1, frames=2, answer=3), sample(2, frames=1, answer=5)], "right")
    out = model(**batch)
    logits = model(**prompt_of(batch)).logits
    full = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    assert close(out.loss, full)
    assert out.logits.shape == (8, 120)
    assert close(out.logits, logits[:, :-1][batch["labels"][:, 1:] != -100])


def test_losses_of_a_window_add_up_to_the_mean_over_its_tokens(model):
    samples = [sample(1, answer=3), sample(2, answer=5)]
    window = model(**collate(samples, "right")).loss
    parts = [model(**s, num_items_in_batch=torch.tensor(8)).loss for s in samples]
    assert close(sum(parts), window)


def test_a_sample_without_supervised_tokens_costs_nothing(model):
    loss = model(**sample(1) | {"labels": torch.full_like(sample(1)["labels"], -100)}).loss
    assert loss.item() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(model, side):
    samples = [sample(1, frames=1, text=2), sample(2, frames=3, text=9)]
    together = model(**collate(samples, side)).logits
    alone = torch.cat([model(**s).logits for s in samples])
    assert close(together, alone, 1e-4)


def test_positions_are_multimodal(model):
    """Frames of 2×3 tokens advance the position by 3, not by 6 (M-RoPE, Qwen2-VL paper section 2.1)."""
    batch = sample(1, frames=2)
    positions = model._positions(batch["input_ids"], batch["attention_mask"], batch["image_grid_thw"], None, 0)
    start = 2 + POSITIONS + 1 + 1  # text, audio, text, vision start
    assert positions[:, 0, :start].tolist() == [list(range(start))] * 3
    first_frame = positions[:, 0, start : start + 6] - start
    assert first_frame.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    assert positions[:, 0, start + 6].tolist() == [start + 3] * 3
    one_dimensional = torch.arange(positions.shape[-1]).expand(3, 1, -1)
    assert not close(model(**batch, position_ids=one_dimensional).logits, model(**batch).logits, 1e-3)


@pytest.mark.parametrize("found", [POSITIONS - 1, POSITIONS + 1, 0])
def test_a_wrong_number_of_audio_tokens_is_a_clear_error(model, found):
    batch = prompt_of(sample(1))
    ids = batch["input_ids"].clone()
    ids[ids == AUDIO] = 1
    ids[0, 2 : 2 + found] = AUDIO
    with pytest.raises(
        SurgvqaError, match=rf"{found} audio pad tokens \(id {AUDIO}\) but the audio gives 1 × 6 features"
    ):
        model(**batch | {"input_ids": ids})


def test_a_sum_that_fits_by_chance_is_an_error_too(model):
    batch = prompt_of(collate([sample(1), sample(2)], "right"))
    ids = batch["input_ids"].clone()
    ids[0, 2], ids[1, 0] = 1, AUDIO
    with pytest.raises(SurgvqaError, match="5, 7 audio pad tokens"):
        model(**batch | {"input_ids": ids})


def test_audio_tokens_without_audio_and_frames_that_do_not_fit_are_errors(model):
    batch = prompt_of(sample(1))
    with pytest.raises(SurgvqaError, match=r"6 audio pad tokens .* 0 × 0 features"):
        model(**{name: tensor for name, tensor in batch.items() if name != "input_features"})
    with pytest.raises(SurgvqaError, match=r"12 image pad tokens .* give 6 features"):
        model(**batch | {"pixel_values": batch["pixel_values"][:24], "image_grid_thw": batch["image_grid_thw"][:1]})


def test_text_alone_needs_no_encoder(model):
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 120)


@torch.no_grad()
def test_features_from_a_cache_stand_for_pixels_and_mels(model):
    batch = collate([sample(1), sample(2, frames=3)], "left")
    cached = {name: t for name, t in batch.items() if name not in ("pixel_values", "input_features")}
    cached["image_features"] = model.encode_images(batch["pixel_values"], batch["image_grid_thw"])
    cached["audio_features"] = model.encode_audio(batch["input_features"])
    assert cached["image_features"].shape == (30, 64) and cached["audio_features"].shape == (2, POSITIONS, 128)
    expected, expected_tokens = model(**batch).loss, generate(model, batch)
    del model.model.visual.blocks, model.audio_encoder.layers  # the encoders are not even called
    assert torch.equal(model(**cached).loss, expected)
    assert generate(model, cached) == expected_tokens


def test_positions_of_a_packed_row_are_upstreams_of_each_sample(model):
    samples = [sample(1, frames=1), sample(2, frames=3), sample(3, frames=2)]
    alone = [model._positions(s["input_ids"], None, s["image_grid_thw"], None, 0) for s in samples]
    assert torch.equal(packed(samples)["position_ids"], torch.cat(alone, dim=-1))


@torch.no_grad()
def test_samples_packed_into_one_row_do_not_see_each_other(model):
    first, second, other = sample(1, frames=1), sample(2, frames=3), sample(4, frames=2)
    row, changed = packed([first, second]), packed([other, second])
    length = second["input_ids"].shape[1]
    logits = [model(**{k: t for k, t in b.items() if k != "labels"}).logits[:, -length:] for b in (row, changed)]
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("multiple_of", [1, 64])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_a_packed_row_gives_the_loss_and_gradients_of_its_samples(
    checkpoint, flash_attn, attention, cached, multiple_of
):
    model = with_weights(add_lora(load(checkpoint), options())).train()
    base = model.get_base_model()
    samples = [sample(1, frames=1, answer=3), sample(2, frames=3, answer=6), sample(3, frames=2, answer=2)]
    apart = [gradients(model, s | {"num_items_in_batch": 11}) for s in samples]
    losses = [model(**s, num_items_in_batch=11).loss for s in samples]
    row = packed(samples, multiple_of)
    if cached:
        row["image_features"] = base.encode_images(row.pop("pixel_values"), row["image_grid_thw"])
        row["audio_features"] = base.encode_audio(row.pop("input_features"))
    base.model.language_model.config._attn_implementation = attention
    assert close(model(**row, num_items_in_batch=11).loss, sum(losses), 1e-5)
    assert close(model(**row).loss, sum(losses), 1e-5)
    found = gradients(model, row | {"num_items_in_batch": 11})
    assert all(close(found[name], sum(g[name] for g in apart), 1e-4) for name in found)
    assert len(flash_attn) == (3 * 2 if attention == "flash_attention_2" else 0), "three passes, two layers"


# --- flash-attn ------------------------------------------------------------------------------------------------------


@pytest.fixture
def flash_attn(monkeypatch):
    """flash-attn needs a GPU: transformers gets functions that compute the same where it would import the kernels'.

    Gives a list that grows by the arguments (cu_seqlens_q, cu_seqlens_k, max_seqlen) of each variable-length call.
    """
    calls = []

    def attend(q, k, v, scale, **how):
        q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True, **how).transpose(-3, -2)

    def fixed(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        return attend(q, k, v, softmax_scale, is_causal=causal)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
               causal=False):  # fmt: skip
        if not torch.compiler.is_compiling():  # a list that grows would be compiled for anew each time
            calls.append((cu_seqlens_q, cu_seqlens_k, max_seqlen_q))
        place = torch.arange(len(q), dtype=cu_seqlens_q.dtype)
        of_sample = torch.searchsorted(cu_seqlens_q, place, right=True)
        seen = of_sample[:, None] == of_sample
        return attend(q[None], k[None], v[None], softmax_scale, attn_mask=seen.tril() if causal else seen)[0]

    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: (fixed, varlen, *[None] * 3))
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    return calls


class Waits(TorchDispatchMode):
    """Counts how often the host would have to wait for the GPU to know a number."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def with_flash_attention(model):
    for part in (model.model.language_model, model.model.visual):
        part.config._attn_implementation = "flash_attention_2"
    return model


@torch.no_grad()
@pytest.mark.parametrize("several", [True, False])
def test_no_layer_with_flash_attention_makes_the_host_wait(flash_attn, several):
    row = packed([sample(1, frames=1), sample(2, frames=3)]) if several else sample(3)
    row.pop("attention_mask", None)
    counts = []
    for depth in (1, 4):
        vision = CONFIG["vision_config"] | {"depth": depth}
        model = with_flash_attention(built(num_hidden_layers=depth, vision_config=vision))
        with Waits() as waits:
            model(**row)
        counts.append(waits.count)
    assert counts[0] == counts[1], "as often with one layer as with four"
    vision_calls = [call for call in flash_attn if len(call[0]) == len(row["image_grid_thw"]) + 1]
    assert len(vision_calls) == 5 and all(isinstance(longest, int) for _, _, longest in flash_attn)
    in_four_layers = vision_calls[1:]
    assert all(call[0] is in_four_layers[0][0] for call in in_four_layers), (
        "cumulative lengths come once for all layers"
    )


@torch.no_grad()
def test_flash_attention_gives_the_sdpa_loss(checkpoint, flash_attn):
    for row in (packed([sample(1, frames=1), sample(2, frames=3)]), sample(3)):
        row.pop("attention_mask", None)
        assert close(with_flash_attention(load(checkpoint))(**row).loss, load(checkpoint)(**row).loss)
    assert flash_attn


@pytest.mark.parametrize("several", [True, False])
def test_compiled_layers_share_their_graphs_with_flash_attention_too(monkeypatch, flash_attn, several):
    """transformers' way to flash-attn reads the layer's number, and torch gives up after eight graphs of one layer."""
    import torch._dynamo.utils as dynamo

    torch._dynamo.reset()
    dynamo.counters.clear()
    dynamo.clear_compilation_metrics()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = with_flash_attention(built(num_hidden_layers=12)).bfloat16()
    row = packed([sample(1, frames=1), sample(2, frames=3)]) if several else sample(3)
    row.pop("attention_mask", None)
    plain = model(**row).loss
    layers.compile_layers(model)
    assert close(model(**row).loss, plain, 1e-2)
    counted = compilations()
    assert 1 <= counted["graphs"] <= 3 and counted["graph_breaks"] == counted["compile_failures"] == 0
    if several:
        own = [(q, k) for q, k, _ in flash_attn if len(q) == 3]
        assert len(own) == 12 and all(q is not k for q, k in own), "torch breaks the graph where both are one tensor"


# --- generation ------------------------------------------------------------------------------------------------------


def test_a_left_padded_batch_generates_what_its_samples_generate_alone(model):
    samples = [sample(1, frames=1, answer=0), sample(2, frames=3, text=9, answer=0), sample(3, answer=0)]
    alone = [generate(model, s)[0] for s in samples]
    assert len(set(map(tuple, alone))) == 3  # the inputs matter
    assert generate(model, collate(samples, "left")) == alone
    assert [generate(model, s)[0] for s in samples] == alone  # nothing of the batch is left behind


def test_generation_with_and_without_cache_agree(model):
    batch = collate([sample(1, frames=1), sample(2, frames=3)], "left")
    assert generate(model, batch) == generate(model, batch, use_cache=False)


@torch.no_grad()
def test_a_step_on_the_cache_equals_the_whole_sequence(model):
    """The plain forward, without generate's help: M-RoPE goes on after the cached tokens."""
    batch = prompt_of(collate([sample(1, frames=1), sample(2, frames=3)], "left"))
    whole = model(**batch).logits
    for with_mask in (True, False):
        if not with_mask:
            batch = prompt_of(sample(1))
            whole = model(**batch).logits
        head = batch | {name: batch[name][:, :-2] for name in ("input_ids", "attention_mask")}
        cache = model(**head, use_cache=True).past_key_values
        mask = {"attention_mask": batch["attention_mask"]} if with_mask else {}
        tail = model(input_ids=batch["input_ids"][:, -2:], past_key_values=cache, **mask).logits
        assert close(tail, whole[:, -2:], 1e-4)


# --- training --------------------------------------------------------------------------------------------------------


def gradients(model, batch) -> dict:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def options(**changes) -> LoraOptions:
    return LoraOptions(**({"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | changes))


def with_weights(peft_model):
    """The adapter with random B matrices: a fresh LoRA adds nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.adapter_parameters(peft_model).items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return peft_model


def test_checkpointed_layers_give_the_same_gradients_and_encoders_are_left_alone(checkpoint):
    batch = collate([sample(1), sample(2, frames=3)], "right")
    model = with_weights(add_lora(load(checkpoint), options())).train()
    kept = gradients(model, batch)
    base = model.get_base_model()
    decoder = layers.decoder_layers(model)
    parts = [*(layer.mlp for layer in decoder), *base.model.visual.blocks, *base.audio_encoder.layers]
    runs = []
    hooks = [part.register_forward_pre_hook(lambda *_: runs.append(1)) for part in parts]
    for count in (len(decoder), 1, 0):
        layers.checkpoint_layers(model, count)
        recomputed = gradients(model, batch)
        assert len(runs) == len(parts) + count
        assert kept.keys() == recomputed.keys()
        assert all(close(recomputed[name], kept[name]) for name in kept)
        runs.clear()
    for hook in hooks:
        hook.remove()


def test_only_the_adapter_learns_and_frozen_encoders_stay_in_eval_mode(checkpoint):
    model = with_weights(add_lora(load(checkpoint), options())).train()
    base = model.get_base_model()
    assert base.model.language_model.training
    assert not base.model.visual.training and not base.audio_encoder.training
    found = gradients(model, sample(1))
    assert len(found) == 2 * 7 * 2 + 1 and all(".default." in name for name in found)
    assert all(g.abs().sum() > 0 for g in found.values())


def test_an_encoder_that_is_unfrozen_learns(model):
    model.audio_encoder.layers[1].requires_grad_(True)
    model.train()
    assert model.audio_encoder.training and not model.model.visual.training
    found = gradients(model, sample(1))
    assert found and all(name.startswith("audio_encoder.layers.1.") for name in found)


# --- adapters --------------------------------------------------------------------------------------------------------

NEW_TARGETS = LORA_TARGETS.replace(r"model\.layers", r"model\.language_model\.layers")


@pytest.mark.parametrize("targets", [LORA_TARGETS, NEW_TARGETS])
def test_the_pattern_may_use_old_or_new_names(checkpoint, targets):
    model = add_lora(load(checkpoint), options(lora_target_modules=targets))
    names = set(adapter.adapter_parameters(model))
    assert len(names) == 2 * 7 * 2 + 1
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in names
    assert "base_model.model.audio_projector.weight" in names


@pytest.mark.parametrize("targets, text", [("model.layer", "matches none"), ("model.(", "not a regular expression")])
def test_a_pattern_that_fits_nothing_is_a_usage_error(model, targets, text):
    with pytest.raises(UsageError, match=text) as error:
        add_lora(model, options(lora_target_modules=targets))
    assert "lora_target_modules" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapters_dtype_is_its_own(checkpoint, dtype):
    model = with_weights(add_lora(load(checkpoint, torch.bfloat16), options(), dtype=dtype)).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    found = gradients(model, sample(1))
    assert all(g.dtype == dtype and g.isfinite().all() for g in found.values())


def test_float32_is_the_default_on_a_bf16_model(checkpoint):
    model = add_lora(load(checkpoint, torch.bfloat16), options())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@torch.no_grad()
def test_save_and_load_give_the_same_model(checkpoint, tmp_path):
    trained = with_weights(add_lora(load(checkpoint), options()))
    trained.get_base_model().audio_projector.weight.mul_(1.5)
    batch = sample(1)
    plain, expected = load(checkpoint)(**batch).logits, trained(**batch).logits
    assert not close(plain, expected, 1e-2)
    save_adapter(trained, tmp_path / "a", {"num_frames": 8})
    again = load_adapter(load(checkpoint), tmp_path / "a")
    assert torch.equal(again(**batch).logits, expected)
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    save_adapter(again, tmp_path / "b")
    first, second = (tmp_path / name / adapter.WEIGHTS for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_what_is_saved_is_in_the_authors_format(checkpoint, tmp_path):
    save_adapter(add_lora(load(checkpoint), options(lora_r=4)), tmp_path, {"num_frames": 8})
    assert sorted(p.name for p in tmp_path.iterdir()) == [adapter.CONFIG, adapter.WEIGHTS, adapter.SETTINGS]
    config = json.loads((tmp_path / adapter.CONFIG).read_text())
    assert config["target_modules"] == LORA_TARGETS and config["modules_to_save"] == ["audio_projector"]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert config["base_model_name_or_path"] == str(checkpoint)
    assert json.loads((tmp_path / adapter.SETTINGS).read_text()) == {"num_frames": 8}
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / adapter.WEIGHTS).items()}
    assert shapes["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"] == (4, 96)
    assert shapes["base_model.model.audio_projector.weight"] == (64, 128)


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"model.layers.0.mlp.up_proj": 2}}]
)
def test_variants_of_lora_load_as_peft_means_them(checkpoint, tmp_path, change):
    """Against PEFT itself, told upstream's names: same tensors, same outputs."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 4, "lora_alpha": 8, "modules_to_save": ["audio_projector"]} | change
    ranks = {name.replace("model.", "language_model."): r for name, r in config.get("rank_pattern", {}).items()}
    told = LoraConfig(target_modules=NEW_TARGETS, **config | {"rank_pattern": ranks})
    theirs = with_weights(get_peft_model(load(checkpoint), told))
    tensors = {name: p.detach().clone() for name, p in adapter.adapter_parameters(theirs).items()}
    save_file(tensors, tmp_path / adapter.WEIGHTS)
    on_disk = {"peft_type": "LORA", "target_modules": LORA_TARGETS} | config
    (tmp_path / adapter.CONFIG).write_text(json.dumps(on_disk))
    ours = load_adapter(load(checkpoint), tmp_path)
    assert close(ours(**sample(1)).logits, theirs(**sample(1)).logits)


def saved_adapter(folder: Path, checkpoint: Path, spoil=None, **config) -> Path:
    save_adapter(with_weights(add_lora(load(checkpoint), options())), folder)
    if spoil:
        tensors = load_file(folder / adapter.WEIGHTS)
        spoil(tensors)
        save_file(tensors, folder / adapter.WEIGHTS)
    file = folder / adapter.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "spoil, config, text",
    [
        (None, {"r": 8}, r"lora_A.weight is \[4, .*\], but .* call for \[8, "),
        (lambda t: t.pop(Q), {}, f"no tensor {Q}"),
        (lambda t: t.update({Q.replace("layers.0", "layers.9"): torch.zeros(4, 64)}), {}, "layers.9.* has no place"),
        (lambda t: t.update({Q: torch.zeros(4, 65)}), {}, r"q_proj.lora_A.weight is \[4, 65\], but .* \[4, 64\]"),
        (
            lambda t: t.update({Q.replace("model.layers", "model.language_model.layers"): t[Q] + 1}),
            {},
            "old and new names",
        ),
        (None, {"target_modules": r"model\.layers\.\d+\.mlp\.up_proj"}, "has no place in the model"),
        (None, {"target_modules": r"h\.\d+\.attn"}, "matches none"),
        (None, {"modules_to_save": None}, "audio_projector.weight has no place"),
        (None, {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        (None, {"bias": "lora_only"}, "bias is 'lora_only'"),
        (None, {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_a_usage_error_of_one_line(checkpoint, tmp_path, spoil, config, text):
    with pytest.raises(UsageError, match=text) as error:
        load_adapter(load(checkpoint), saved_adapter(tmp_path, checkpoint, spoil, **config))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_no_adapter_and_a_truncated_adapter_are_usage_errors(checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"adapter_config\.json"):
        load_adapter(load(checkpoint), tmp_path / "none")
    folder = saved_adapter(tmp_path / "a", checkpoint)
    whole = (folder / adapter.WEIGHTS).read_bytes()
    (folder / adapter.WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(UsageError, match="not a whole safetensors file"):
        load_adapter(load(checkpoint), folder)


def test_new_names_in_an_adapter_file_load_too(checkpoint, tmp_path):
    def rename(tensors: dict) -> None:
        for name in list(tensors):
            tensors[name.replace("model.model.layers", "model.model.language_model.layers")] = tensors.pop(name)

    folder = saved_adapter(tmp_path, checkpoint, rename, target_modules=NEW_TARGETS)
    assert load_adapter(load(checkpoint), folder) is not None


def test_a_save_that_breaks_off_leaves_the_old_adapter_whole(checkpoint, tmp_path, monkeypatch):
    folder = saved_adapter(tmp_path, checkpoint)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(adapter, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_adapter(add_lora(load(checkpoint), options()), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


# --- attention -------------------------------------------------------------------------------------------------------


def gpu(monkeypatch, capability: tuple[int, int], flash_attn, accepted: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test GPU")
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setattr("surgvqa.model.device.is_flash_attn_2_available", lambda: accepted)


def test_attention_on_a_cpu_is_sdpa_and_says_why(monkeypatch):
    name, why = choose_attention("auto", "cpu")
    assert name == "sdpa" and "needs a CUDA GPU" in why
    with pytest.raises(UsageError, match="flash_attention_2, but flash-attn needs a CUDA GPU"):
        choose_attention("flash_attention_2", "cpu")
    assert choose_attention("eager", "cpu")[0] == "eager"


def test_attention_on_a_gpu_is_flash_attention_when_it_can_run(monkeypatch):
    gpu(monkeypatch, (8, 0), types.ModuleType("flash_attn"))
    assert choose_attention("auto", "cuda")[0] == "flash_attention_2"
    assert choose_attention("sdpa", "cuda")[0] == "sdpa"
    gpu(monkeypatch, (7, 5), types.ModuleType("flash_attn"))
    name, why = choose_attention("auto", "cuda")
    assert name == "sdpa" and "Test GPU has compute capability 7.5" in why
    gpu(monkeypatch, (9, 0), types.ModuleType("flash_attn"), accepted=False)
    name, why = choose_attention("auto", "cuda")
    assert name == "sdpa" and "transformers does not take" in why
    gpu(monkeypatch, (9, 0), None)  # None in sys.modules: import fails
    name, why = choose_attention("auto", "cuda")
    assert name == "sdpa" and "cannot be imported" in why
    with pytest.raises(UsageError, match="cannot be imported"):
        choose_attention("flash_attention_2", "cuda")


def test_every_part_runs_the_attention_asked_for(checkpoint):
    model = load_model(checkpoint, dtype=torch.float32, device="cpu", attn_implementation="eager")
    parts = (model.model.language_model, model.model.visual, model.audio_encoder)
    assert [part.config._attn_implementation for part in parts] == ["eager"] * 3
    assert close(model(**sample(1)).logits, load(checkpoint)(**sample(1)).logits, 1e-4)
