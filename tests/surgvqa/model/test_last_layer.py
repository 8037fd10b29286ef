"""The last layer at the positions that are read gives what the whole layer gives there."""

import pytest

torch = pytest.importorskip("torch")
from tiny_model import collate, gradients, lora_options, packed, sample, with_weights  # noqa: E402

from surgvqa.model import last_layer, layers  # noqa: E402
from surgvqa.model.adapter import add_lora  # noqa: E402
from surgvqa.model.generation import KeyValues  # noqa: E402

pytestmark = pytest.mark.model


@pytest.fixture
def everywhere(monkeypatch):
    """Calls what it is given, with the last layer computed everywhere."""

    def call(compute):
        with monkeypatch.context() as patch:
            patch.setattr("surgvqa.model.audio_qwen2vl.can_read_at", lambda *_, **__: False)
            return compute()

    return call


@pytest.fixture
def read(monkeypatch):
    """The positions at which the last layer was computed alone."""
    found = []
    alone = last_layer._LastLayer.__call__

    def counted(self, *arguments, **keywords):
        found.append(self.read_at.tolist())
        return alone(self, *arguments, **keywords)

    monkeypatch.setattr(last_layer._LastLayer, "__call__", counted)
    return found


def unmasked(batch: dict) -> dict:
    """As training passes it: rows are padded on the right, and there is no mask."""
    return {name: value for name, value in batch.items() if name != "attention_mask"}


@pytest.mark.parametrize("recomputing", [0, 2])
def test_loss_and_gradients_are_those_of_the_whole_layer(model, everywhere, read, recomputing):
    adapted = with_weights(add_lora(model, lora_options()))
    layers.checkpoint_layers(adapted, recomputing)
    batch = unmasked(sample(1, frames=2, answer=4))
    whole = everywhere(lambda: (adapted.train()(**batch).loss, gradients(adapted, batch)))
    assert not read
    loss, found = adapted(**batch).loss, gradients(adapted, batch)
    supervised = (batch["labels"][0, 1:] != -100).nonzero()[:, 0].tolist()
    assert len(supervised) == 4 and read == [supervised] * 2
    torch.testing.assert_close(loss, whole[0])
    assert found.keys() == whole[1].keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, whole[1][name], msg=name)
        assert gradient.any(), name


def test_logits_and_cache_of_prompts_are_those_of_the_whole_layer(model, everywhere, read):
    whole_batch = collate([sample(1, frames=1, text=2), sample(2, frames=3, text=9)], "right")
    batch = unmasked(whole_batch)
    ids, mask, grids = (whole_batch[name] for name in ("input_ids", "attention_mask", "image_grid_thw"))
    batch["position_ids"] = model._positions(ids, mask, grids, None, 0)
    lengths = torch.tensor([sample(1, frames=1, text=2)["input_ids"].shape[1], batch["input_ids"].shape[1]])
    at = torch.arange(2) * batch["input_ids"].shape[1] + lengths - 1

    def run():
        cache = KeyValues(model, 2, 64)
        prompt = {name: value for name, value in batch.items() if name != "labels"}
        with torch.inference_mode():
            mask = {"full_attention": None}  # as generation says that the prompts need none
            logits = model(**prompt, attention_mask=mask, past_key_values=cache, use_cache=True, read_at=at).logits
        return logits, cache.kept

    whole = everywhere(run)
    assert not read
    logits, kept = run()
    assert read == [at.tolist()]
    torch.testing.assert_close(logits, whole[0])
    torch.testing.assert_close(kept, whole[1])


def test_it_is_computed_everywhere_where_positions_would_be_mixed_up(model, read):
    one, two = sample(1, answer=3), sample(2, frames=1, answer=5)
    model(**unmasked(collate([one, two], "right")))  # rows with unequal numbers of positions
    model(**packed([one, two]))
    model(**collate([one], "left"))  # has a mask, which could have padding on the left
    model(**unmasked(one) | {"labels": torch.full_like(one["labels"], -100)})
    assert not read


def test_a_layer_with_dropout_in_its_attention_or_a_window_is_computed_everywhere(model, read):
    batch, attention = unmasked(sample(1)), model.model.language_model.layers[-1].self_attn
    attention.attention_dropout = 0.1
    model.train()(**batch)
    assert not read
    model.eval()(**batch)
    assert len(read) == 1
    attention.sliding_window = 4
    model(**batch)
    assert len(read) == 1


def test_the_layer_is_itself_again_afterwards_also_after_an_error(model, monkeypatch):
    last = model.model.language_model.layers[-1]
    model(**unmasked(sample(1)))
    assert "forward" not in vars(last)
    monkeypatch.setattr(last_layer, "attend_grouped", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**unmasked(sample(1)))
    assert "forward" not in vars(last)
