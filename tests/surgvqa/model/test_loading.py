"""Checkpoints in the author's format and in transformers' are loaded; what does not fit is refused."""

import json

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402
from tiny_model import (  # noqa: E402
    WHISPER,
    load,
    random_tensors,
    write_checkpoint,
)

from surgvqa.checkpoint.names import to_old_name  # noqa: E402
from surgvqa.errors import SurgvqaError, UsageError  # noqa: E402

pytestmark = pytest.mark.model


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
