"""A step of bitsandbytes' optimiser without a wait after each parameter."""

import inspect

import pytest

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")
from bitsandbytes.optim import optimizer as theirs  # noqa: E402

from surgvqa.training.bitsandbytes_internals import without_waiting  # noqa: E402

pytestmark = pytest.mark.model


def waits(monkeypatch, optimizer) -> list[torch.Tensor]:
    """The parameters that a step waits for. On a CPU, where it cannot compute, it goes through them all the same."""
    waited: list[torch.Tensor] = []
    monkeypatch.setattr(theirs, "sync_gpu", waited.append)
    for name in ("init_state", "update_step", "to_gpu", "check_overrides"):
        monkeypatch.setattr(optimizer, name, lambda *_: None)
    optimizer.step()
    return waited


def parameters():
    found = [torch.nn.Parameter(torch.zeros(4)) for _ in range(3)]
    for parameter in found:
        parameter.grad = torch.ones(4)
    return found


def test_it_waits_for_nothing_inside_and_for_each_parameter_outside(monkeypatch):
    optimizer = bitsandbytes.optim.AdamW8bit(parameters())
    assert len(waits(monkeypatch, optimizer)) == 3, "bitsandbytes no longer waits: without_waiting can go"
    with without_waiting(optimizer):
        assert theirs.sync_gpu.__module__ == without_waiting.__module__
        optimizer.step()
    assert len(waits(monkeypatch, optimizer)) == 3


def test_paged_states_and_other_optimisers_are_left_alone():
    before = theirs.sync_gpu
    for optimizer in (bitsandbytes.optim.PagedAdamW8bit(parameters()), torch.optim.AdamW(parameters())):
        with without_waiting(optimizer):
            assert theirs.sync_gpu is before
    assert "sync_gpu(p)" in inspect.getsource(theirs.Optimizer8bit.step)


def test_it_waits_again_after_an_error():
    before = theirs.sync_gpu
    with pytest.raises(RuntimeError), without_waiting(bitsandbytes.optim.AdamW8bit(parameters())):
        raise RuntimeError
    assert theirs.sync_gpu is before
