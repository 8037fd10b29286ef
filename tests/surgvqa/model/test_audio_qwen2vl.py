"""The model's arithmetic on a tiny random checkpoint of the real architecture, in the author's format."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from tiny_model import (  # noqa: E402
    AUDIO,
    POSITIONS,
    close,
    collate,
    generate,
    gradients,
    load,
    lora_options,
    packed,
    prompt_of,
    sample,
    with_weights,
)

from surgvqa.errors import SurgvqaError  # noqa: E402
from surgvqa.model import layers  # noqa: E402
from surgvqa.model.adapter import add_lora  # noqa: E402
from surgvqa.model.audio_qwen2vl import rows_of  # noqa: E402

pytestmark = pytest.mark.model


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
    with pytest.raises(SurgvqaError, match=rf"{found} audio pad tokens \(id {AUDIO}\) but the audio gives 6 features"):
        model(**batch | {"input_ids": ids})


def test_a_sum_that_fits_by_chance_is_an_error_too(model):
    batch = prompt_of(collate([sample(1), sample(2)], "right"))
    ids = batch["input_ids"].clone()
    ids[0, 2], ids[1, 0] = 1, AUDIO
    with pytest.raises(SurgvqaError, match="5, 7 audio pad tokens"):
        model(**batch | {"input_ids": ids})


def test_audio_tokens_without_audio_and_frames_that_do_not_fit_are_errors(model):
    batch = prompt_of(sample(1))
    with pytest.raises(SurgvqaError, match=r"6 audio pad tokens .* gives no features"):
        model(**{name: tensor for name, tensor in batch.items() if name != "input_features"})
    with pytest.raises(SurgvqaError, match=r"12 image pad tokens .* give 6 features"):
        model(**batch | {"pixel_values": batch["pixel_values"][:24], "image_grid_thw": batch["image_grid_thw"][:1]})


def test_text_alone_needs_no_encoder(model):
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 120)


@torch.no_grad()
def test_the_first_of_a_questions_states_go_on_and_each_sample_gets_its_own(model):
    """As many as its prompt has pad tokens: cut in the model, or before it and joined."""
    batch = prompt_of(collate([sample(1), sample(2)], "right"))
    states = model.encode_audio(batch.pop("input_features"))
    ids, tokens = batch["input_ids"], [3, POSITIONS]
    first = (ids[0] == AUDIO).nonzero()[:, 0]
    ids[0, first[3:]] = 1  # text now
    with pytest.raises(SurgvqaError, match=f"3, {POSITIONS} audio pad tokens"):
        model(**batch, audio_features=states)
    with pytest.raises(SurgvqaError, match=f"gives {POSITIONS}, 3 features"):
        model(**batch, audio_features=states, audio_tokens=tokens[::-1])
    cut = model(**batch, audio_features=states, audio_tokens=tokens).logits
    joined = torch.cat([states[0, :3], states[1]])
    assert torch.equal(model(**batch, audio_features=joined, audio_tokens=tokens).logits, cut)
    other = torch.cat([states[0, 1:4], states[1]])
    assert not torch.equal(model(**batch, audio_features=other, audio_tokens=tokens).logits, cut)


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
    model = with_weights(add_lora(load(checkpoint), lora_options())).train()
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


def test_checkpointed_layers_give_the_same_gradients_and_encoders_are_left_alone(checkpoint):
    batch = collate([sample(1), sample(2, frames=3)], "right")
    model = with_weights(add_lora(load(checkpoint), lora_options())).train()
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
    model = with_weights(add_lora(load(checkpoint), lora_options())).train()
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_the_token_embeddings_are_the_tables(dtype):
    weight = torch.randn(50, 24).to(dtype)
    numbers = np.array([3, 49, 0])
    rows = rows_of(weight, numbers, pinned=False)
    assert rows.dtype == dtype and torch.equal(rows, weight[numbers])
    with pytest.raises(IndexError):
        rows_of(weight, np.array([50]), pinned=False)
