"""Which attention is chosen, and flash-attn's."""

import functools
import json
import sys
import types

import pytest

torch = pytest.importorskip("torch")
from tiny_model import (  # noqa: E402
    CONFIG,
    built,
    close,
    load,
    packed,
    sample,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from surgvqa.errors import UsageError  # noqa: E402
from surgvqa.model import attention, layers  # noqa: E402
from surgvqa.model.attention import choose_attention  # noqa: E402
from surgvqa.model.loading import load_model  # noqa: E402
from surgvqa.model.torch_internals import compilations  # noqa: E402

pytestmark = pytest.mark.model


# --- flash-attn ------------------------------------------------------------------------------------------------------


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


# --- attention -------------------------------------------------------------------------------------------------------


def gpu(monkeypatch, capability: tuple[int, int], flash_attn, accepted: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test GPU")
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setattr("surgvqa.model.attention.is_flash_attn_2_available", lambda: accepted)


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
    assert name == "sdpa" and "transformers does not recognise" in why
    gpu(monkeypatch, (9, 0), None)  # None in sys.modules: import fails
    name, why = choose_attention("auto", "cuda")
    assert name == "sdpa" and "cannot be imported" in why
    with pytest.raises(UsageError, match="cannot be imported"):
        choose_attention("flash_attention_2", "cuda")


SMALL = attention.AttentionShape(4, 2, 8, 40)


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """A card on which both kernels run: the milliseconds or the error of each, and how often each ran."""
    gpu(monkeypatch, (9, 0), types.ModuleType("flash_attn"))
    monkeypatch.setattr(attention, "compiler_cache_dir", lambda: tmp_path / "cache")
    took: dict[str, float | Exception] = {"flash_attention_2": 2.0, "sdpa": 1.0}
    ran: dict[str, int] = dict.fromkeys(took, 0)
    clock = [0.0]

    def kernel(name):
        def run(query, key, value):
            if isinstance(took[name], Exception):
                raise took[name]
            ran[name] += 1
            clock[0] += took[name] / 1000
            return query * key.mean() * value.mean()

        return run

    monkeypatch.setattr(attention, "KERNELS", {name: kernel(name) for name in took})
    monkeypatch.setattr(attention.time, "perf_counter", lambda: clock[0])
    measure = attention.measure
    monkeypatch.setattr(attention, "measure", lambda shape, device, them: measure(shape, torch.device("cpu"), them))
    return types.SimpleNamespace(took=took, ran=ran, file=tmp_path / "cache" / attention.MEASURED_FILE)


def test_the_faster_kernel_is_measured_once_and_taken(kernels):
    name, why = choose_attention("auto", "cuda", SMALL)
    assert name == "sdpa" and "1.00 ms a layer" in why and "flash_attention_2 2.00 ms, 100% more" in why
    once = dict(kernels.ran)
    assert choose_attention("auto", "cuda", SMALL) == (name, why) and kernels.ran == once
    assert choose_attention("auto", "cuda")[0] == "flash_attention_2"  # answering: not measured
    assert choose_attention("flash_attention_2", "cuda", SMALL)[0] == "flash_attention_2" and kernels.ran == once
    assert choose_attention("auto", "cuda", attention.AttentionShape(4, 2, 8, 512)) == (name, why)  # a nearby length
    kernels.took["flash_attention_2"] = 0.5
    name, why = choose_attention("auto", "cuda", attention.AttentionShape(4, 2, 8, 513))
    assert name == "flash_attention_2" and "sdpa 1.00 ms, 100% more" in why


@pytest.mark.parametrize(
    "damaged", ["", "[]", "no JSON", '{"%s": {"sdpa": 1}}', '{"%s": {"flash_attention_2": "x", "sdpa": 1}}']
)
def test_a_damaged_measurement_is_made_again(kernels, damaged):
    choose_attention("auto", "cuda", SMALL)
    (key,) = json.loads(kernels.file.read_text())
    kernels.file.write_text(damaged.replace("%s", key))
    assert choose_attention("auto", "cuda", SMALL)[0] == "sdpa"
    assert json.loads(kernels.file.read_text()) == {key: {"flash_attention_2": 2.0, "sdpa": 1.0}}


@pytest.mark.parametrize(
    ("broken", "chosen"),
    [
        (("flash_attention_2",), "sdpa"),
        (("sdpa",), "flash_attention_2"),
        (("sdpa", "flash_attention_2"), "flash_attention_2"),
    ],
)
def test_a_kernel_that_fails_is_not_chosen_and_not_remembered(kernels, broken, chosen):
    for name in broken:
        kernels.took[name] = torch.OutOfMemoryError("CUDA out of memory")
    name, why = choose_attention("auto", "cuda", SMALL)
    assert name == chosen and "CUDA out of memory" in why and not kernels.file.exists()


def test_the_kernels_that_are_timed_compute_the_same(monkeypatch):
    """flash-attn's layout around torch's own attention: what differs is the order of tokens and heads."""
    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_func = lambda q, k, v, causal: (
        attention._sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2) * (1 if causal else 0)
    )
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    q, k, v = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    assert close(attention._flash_attention(q, k, v), attention._sdpa(q, k, v), 1e-6)
    measured, problem = attention.measure(SMALL, torch.device("cpu"), attention.KERNELS)
    assert set(measured) == set(attention.KERNELS) and min(measured.values()) > 0 and not problem


def test_every_part_runs_the_attention_asked_for(checkpoint):
    model = load_model(checkpoint, dtype=torch.float32, device="cpu", attn_implementation="eager")
    parts = (model.model.language_model, model.model.visual, model.audio_encoder)
    assert [part.config._attn_implementation for part in parts] == ["eager"] * 3
    assert close(model(**sample(1)).logits, load(checkpoint)(**sample(1)).logits, 1e-4)
