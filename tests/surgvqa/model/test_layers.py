"""Compiled layers: what they keep changes no gradient, whichever of them recompute, also with dropout.

On a GPU where there is one: its kernels make the masks in other ways than a CPU's.
"""

import math
from importlib.metadata import version

import pytest
from packaging.version import Version

pytestmark = pytest.mark.model

LAYERS, HIDDEN, TOKENS = 3, 32, 16


def built(dropout: float, modules: str = r".*[qv]_proj"):
    """A language model of upstream's layers with LoRA. Two dropouts a layer: torch draws their seeds anew where it may
    (with more than four of them it happens not to)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 8, "layer_types": ["full_attention"] * LAYERS,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        "bos_token_id": None, "eos_token_id": None, "use_cache": False,
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
    model = get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, target_modules=rf".*language_model{modules}"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train().to("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def as_it_was():
    """What compile_layers sets for the whole process."""
    import torch
    import torch._functorch.config
    import torch._inductor.config
    from torch._dynamo import config, utils

    torch.set_num_threads(1)
    torch._dynamo.reset()
    utils.counters.clear()
    utils.clear_compilation_metrics()
    with (
        torch._functorch.config.patch(aggressive_recomputation=False),
        torch._inductor.config.patch(joint_custom_post_pass=None),
        config.patch(suppress_errors=False, allow_unspec_int_on_nn_module=False, recompile_limit=8),
    ):
        yield
    torch._dynamo.reset()


def loss(model, seed: int = 5):
    """A number that depends on all of the output; the same dropout masks for the same seed."""
    import torch

    lm = model.get_base_model().model.language_model
    hidden, weights = torch.randn(2, 1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(model.device)
    hidden = hidden.requires_grad_()
    torch.manual_seed(seed)
    return (lm(inputs_embeds=hidden, use_cache=False).last_hidden_state * weights).double().sum()


def gradients(model) -> dict:
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(found: dict, expected: dict) -> bool:
    return all((found[name] - expected[name]).norm() < 1e-4 * expected[name].norm() for name in expected)


def slope_error(model, name: str) -> float:
    """How far the gradient of one matrix, taken along itself, is from finite differences."""
    import torch

    gradient = gradients(model)[name]
    parameter = dict(model.named_parameters())[name]
    step = 3e-3 * gradient / gradient.norm()
    ends = []
    with torch.no_grad():
        for sign in (1, -1):
            parameter.add_(step, alpha=sign)
            with torch.enable_grad():  # as in training: the masks are those of the same graph
                ends.append(loss(model).item())
            parameter.sub_(step, alpha=sign)
    slope = (ends[0] - ends[1]) / (2 * step.norm().item())
    return abs(gradient.norm().item() - slope) / slope


def test_with_dropout_what_is_kept_and_who_recomputes_changes_no_gradient():
    """In one run: products only, then more and more layers recompute, as in a step-down; beside all kept."""
    from surgvqa.model import layers, torch_internals

    model = built(dropout=0.3)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    layers.checkpoint_layers(model.get_base_model(), 0)
    layers.compile_layers(model, "all")
    expected = gradients(model)
    assert not equal(expected, {name: g * 1.001 for name, g in expected.items()})
    assert all(g.norm() > 0.01 for g in expected.values())
    one_kind = torch_internals.compilations()["graphs"]

    import torch._dynamo

    torch._dynamo.reset()
    layers.compile_layers(model, "products")
    for count in (0, 1, 2, LAYERS, 1):
        layers.checkpoint_layers(model.get_base_model(), count)
        assert equal(gradients(model), expected), f"{count} layers recompute"
        assert slope_error(model, names[0]) < 0.01 and slope_error(model, names[-1]) < 0.01
    counted = torch_internals.compilations()
    assert counted["graphs"] <= 3 * one_kind, "at most one for each kind of layer"
    assert counted["graph_breaks"] == counted["compile_failures"] == 0


@pytest.mark.skipif(Version(version("torch")) >= Version("2.14"), reason="known of torch up to 2.13")
def test_the_test_above_sees_torchs_fault(monkeypatch):
    """Without keep_dropout_seeds the gradients are wrong, also with no layer recomputing."""
    from surgvqa.model import layers, torch_internals

    monkeypatch.setattr(torch_internals, "keep_dropout_seeds", lambda: None)
    model = built(dropout=0.3)
    layers.checkpoint_layers(model.get_base_model(), 0)
    layers.compile_layers(model, "products")
    name = next(name for name, p in model.named_parameters() if p.requires_grad)
    assert slope_error(model, name) > 0.05


@pytest.mark.parametrize("count", [0, 2])
def test_without_dropout_compiled_layers_have_the_gradients_of_plain_ones(count):
    from surgvqa.model import layers

    model = built(dropout=0.0, modules=r".*_proj")
    layers.checkpoint_layers(model.get_base_model(), 0)
    expected = gradients(model)
    layers.checkpoint_layers(model.get_base_model(), count)
    layers.compile_layers(model, "products")
    assert equal(gradients(model), expected)
    assert math.isfinite(loss(model).item())


def kept(model) -> float:
    """How many times the hidden states' size is kept for the backward pass, parameters left out."""
    import torch

    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        loss(model)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if not isinstance(t, torch.nn.Parameter)
    }
    return sum(storage.nbytes() for storage in storages.values()) / (TOKENS * HIDDEN * 4)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_that_recomputes_keeps_its_input_alone(compiled):
    """Whichever transformers it is: since 5.23 its own checkpoint is within what is compiled, and keeps more."""
    from surgvqa.model import layers

    model = built(dropout=0.3, modules=r".*_proj")
    if compiled:
        layers.compile_layers(model, "products")
    layers.checkpoint_layers(model.get_base_model(), 0)
    whole = kept(model)
    layers.checkpoint_layers(model.get_base_model(), LAYERS)
    assert LAYERS < kept(model) < LAYERS + 3, "inputs; and around the layers a norm's and the loss's"
    assert whole > 3 * kept(model)
