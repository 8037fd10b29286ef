"""Answers from the cache of fixed size against transformers' own generation."""

import pytest

torch = pytest.importorskip("torch")
from tiny_model import IMAGE, PAD, built, encoded, generate, sample  # noqa: E402

from surgvqa.data.collate import Collator  # noqa: E402
from surgvqa.model import generation  # noqa: E402
from surgvqa.model.transformers_internals import attention_of  # noqa: E402

pytestmark = pytest.mark.model

GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64,
           "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}  # fmt: skip
SAMPLES = [sample(1, frames=1, answer=0), sample(2, frames=3, text=9, answer=0), sample(3, answer=0)]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    """Random weights, large enough that every part matters."""
    model = built(**GROUPED)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.model.language_model.config._attn_implementation = request.param
    return model


def right_padded(samples, multiple_of=1):
    processors = type("Processors", (), {"pad_token_id": PAD, "image_token_id": IMAGE, "merge_size": 2})
    return Collator(processors, multiple_of=multiple_of)([encoded(s) for s in samples])


def answers(model, samples, multiple_of=1, end=-1, tokens=6):
    generator = generation.Generator(model)
    return generator.answer(right_padded(samples, multiple_of), max_new_tokens=tokens, end_token_id=end)


def test_each_sample_of_a_batch_gets_the_answer_that_transformers_gives_it_alone(model):
    alone = [generate(model, s)[0] for s in SAMPLES]
    assert len(set(map(tuple, alone))) == len(SAMPLES)  # the inputs matter
    assert answers(model, SAMPLES) == alone
    assert answers(model, SAMPLES, multiple_of=64) == alone
    assert [answers(model, [s])[0] for s in SAMPLES] == alone
    assert generate(model, SAMPLES[0])[0] == alone[0]  # nothing is left behind


def test_a_batch_leaves_nothing_behind_for_the_next_of_its_shape(model):
    generator = generation.Generator(model)

    def found(samples):
        return generator.answer(right_padded(samples, 64), max_new_tokens=6, end_token_id=-1)

    first = found(SAMPLES)
    steps = generator._steps
    assert found(SAMPLES[::-1]) == first[::-1] and found(SAMPLES) == first
    assert generator._steps is steps
    assert found(SAMPLES[:1]) == first[:1] and generator._steps is not steps


def test_an_answer_ends_before_its_end_token_and_the_others_go_on(model):
    whole = answers(model, SAMPLES)
    end = whole[1][2]
    ended = answers(model, SAMPLES, end=end)
    assert ended == [row[: row.index(end)] if end in row else row for row in whole]
    assert len(ended[1]) <= 2
    assert answers(model, SAMPLES, tokens=1) == [row[:1] for row in whole]


def test_the_attention_of_training_is_put_back_after_an_error(model, monkeypatch):
    before = attention_of(model.model.language_model.config)
    monkeypatch.setattr(generation.Steps, "next", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answers(model, SAMPLES)
    assert attention_of(model.model.language_model.config) == before
    monkeypatch.undo()
    assert answers(model, SAMPLES[:1]) == [generate(model, SAMPLES[0])[0]]


def test_heads_that_share_keys_attend_as_with_repeated_keys():
    query, key, value = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 8)
    mask = torch.zeros(2, 1, 1, 10).masked_fill_(torch.arange(10) > 6, float("-inf"))
    found, _ = generation.grouped_attention(None, query, key, value, mask, scaling=0.3)
    keys, values = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_recorded_steps_give_what_steps_one_by_one_give(monkeypatch):
    model = built(**GROUPED).to("cuda")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    batch = right_padded(SAMPLES, 64)
    batch = {name: x.to("cuda") if torch.is_tensor(x) else x for name, x in batch.items()}

    def found(generator):
        return generator.answer(batch, max_new_tokens=12, end_token_id=-1)

    generator = generation.Generator(model)
    recorded = found(generator)
    assert found(generator) == recorded
    monkeypatch.setattr(generation.Steps, "_record", lambda self: setattr(self, "ids", self._step()))
    assert found(generation.Generator(model)) == recorded
