"""Our model against what the author's fork of transformers 4.47 computed (float32; see shared/oracle/README.md)."""

import json
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from surgvqa.model.adapter import load_adapter  # noqa: E402
from surgvqa.model.loading import load_model  # noqa: E402

pytestmark = pytest.mark.model
LOGITS, LOSS, RELATIVE_GRADIENT = 1e-4, 1e-5, 1e-4


@pytest.fixture(scope="module")
def reference(oracle) -> SimpleNamespace:
    """The oracle's one sample as model inputs, its labels, and the fork's outputs."""
    stored = {name.removeprefix("main."): t for name, t in load_file(oracle / "batch.safetensors").items()}
    batch = {name: t.float() if t.dtype == torch.bfloat16 else t.long() for name, t in stored.items()}
    labels = batch.pop("labels")
    return SimpleNamespace(
        folder=oracle,
        batch=batch,
        labels=labels,
        tensors=load_file(oracle / "outputs.safetensors"),
        values=json.loads((oracle / "outputs.json").read_text()),
        grad_norms=json.loads((oracle / "grad_norms.json").read_text()),
    )


@pytest.fixture(scope="module", params=["stage1", "merged", "adapter_on_stage1_fp32"])
def case(request, reference):
    """(the oracle's name of it, our model, that model's own positions)."""
    folder = reference.folder / request.param.replace("adapter_on_stage1_fp32", "stage1")
    model = load_model(folder, dtype=torch.float32, device="cpu", attn_implementation="sdpa")
    if request.param.startswith("adapter"):
        return request.param, load_adapter(model, reference.folder / "stage2_adapter"), model
    return request.param, model, model


@torch.no_grad()
def test_logits_equal_the_forks_also_the_second_time(case, reference):
    """The fork's own second forward differs: it used 1-D positions from then on (in training, always)."""
    name, model, _ = case
    expected = {
        key.rpartition(".")[2]: tensor
        for key, tensor in reference.tensors.items()
        if key.startswith(f"{name}.main.first.")
    }
    positions = reference.tensors["stage1.main.first.logits_sel_pos"].long()
    for _ in range(2):
        logits = model(**reference.batch).logits
        assert (logits @ reference.tensors["proj_matrix"] - expected["logits_proj"]).abs().max() < LOGITS
        assert (logits[:, positions] - expected["logits_sel"]).abs().max() < LOGITS
        if "logits_argmax" in expected:
            assert (logits.logsumexp(-1) - expected["logits_lse"]).abs().max() < LOGITS
            assert torch.equal(logits.argmax(-1), expected["logits_argmax"].long())


@torch.no_grad()
def test_loss_equals_the_forks_also_the_second_time(case, reference):
    name, model, _ = case
    for _ in range(2):
        loss = model(**reference.batch, labels=reference.labels).loss
        assert abs(loss.item() - reference.values[f"{name}.main.first.loss"]) < LOSS


@torch.no_grad()
def test_positions_equal_the_forks(case, reference):
    _, _, base = case
    seen = []
    hook = base.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    base(**reference.batch)
    base(**reference.batch, labels=reference.labels)
    hook.remove()
    expected = reference.tensors["stage1.main.first.position_ids"].long()
    assert len(seen) == 2 and all(torch.equal(positions, expected) for positions in seen)


def test_greedy_tokens_and_their_positions_equal_the_forks(case, reference):
    name, model, base = case
    name = name.replace("adapter_on_stage1_fp32", "merged")  # the fork generated with the merged one only
    length = reference.values["prompt_len.main"]
    prompt = {k: v[:, :length] if k in ("input_ids", "attention_mask") else v for k, v in reference.batch.items()}
    last = []
    hook = base.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: last.append(kwargs.get("position_ids", args[-1])[:, 0, -1].tolist()),
        with_kwargs=True,
    )
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    hook.remove()
    assert tokens[0, length:].tolist() == reference.values[f"{name}.main.generate.tokens"]
    assert last == reference.values[f"{name}.main.generate.last_position_per_step"]


def test_gradients_through_the_adapter_equal_the_forks(reference):
    base = load_model(reference.folder / "stage1", dtype=torch.float32, device="cpu", attn_implementation="sdpa")
    model = load_adapter(base, reference.folder / "stage2_adapter", trainable=True).eval()  # eval: no dropout
    model(**reference.batch, labels=reference.labels).loss.backward()
    norms = {
        name.replace(".model.language_model.", ".model."): parameter.grad.norm().item()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert norms == pytest.approx(reference.grad_norms, rel=RELATIVE_GRADIENT)
    expected = reference.tensors["grad.audio_projector_rows0_8"]
    assert (base.audio_projector.weight.grad[:8] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_merging_the_adapter_gives_the_forks_merged_weights(reference):
    """PEFT's arithmetic on our modules, rounded once to bf16: bit-equal to the fork's merged checkpoint."""
    base = load_model(reference.folder / "stage1", dtype=torch.bfloat16, device="cpu", attn_implementation="sdpa")
    adapted = load_adapter(base, reference.folder / "stage2_adapter")
    merged = adapted.merge_and_unload().to(torch.bfloat16).state_dict()
    expected = load_model(reference.folder / "merged", dtype=torch.bfloat16, device="cpu", attn_implementation="sdpa")
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.state_dict().items())
