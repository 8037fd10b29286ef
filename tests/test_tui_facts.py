"""The Monitor's figures of a run."""

from types import SimpleNamespace

from tui.facts import waiting
from tui.follow import RunModel


def test_a_starved_gpu_is_visible():
    follower = SimpleNamespace(model=RunModel())
    assert waiting(follower) == ""
    follower.model.feed([{"kind": "metric", "t": 1.0, "step": 1, "loss": 2.0, "data_wait": 0.376}])
    assert waiting(follower) == waiting(follower, least=0.1) == "38 % waiting for data"
    follower.model.feed([{"kind": "metric", "t": 2.0, "step": 2, "loss": 2.0, "data_wait": 0.004}])
    assert waiting(follower) == "0 % waiting for data" and waiting(follower, least=0.1) == ""
