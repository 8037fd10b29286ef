"""The Monitor's figures of a run."""

from types import SimpleNamespace

from tui.facts import out_of_memory, waiting
from tui.follow import RunModel


def test_a_starved_gpu_is_visible():
    follower = SimpleNamespace(model=RunModel())
    assert waiting(follower) == ""
    follower.model.feed([{"kind": "metric", "t": 1.0, "step": 1, "loss": 2.0, "data_wait": 0.376}])
    assert waiting(follower) == waiting(follower, least=0.1) == "38 % waiting for data"
    follower.model.feed([{"kind": "metric", "t": 2.0, "step": 2, "loss": 2.0, "data_wait": 0.004}])
    assert waiting(follower) == "0 % waiting for data" and waiting(follower, least=0.1) == ""


def test_what_was_done_about_a_lack_of_memory_comes_first():
    oom = {"step": 40, "text": "tried to allocate 0.62 GB: going on with fewer", "action": "going on with fewer"}
    assert out_of_memory(oom) == ["out of GPU memory at step 40: going on with fewer; tried to allocate 0.62 GB"]
    assert out_of_memory({"step": None, "text": "batch of 8: tried"}) == ["out of GPU memory: batch of 8: tried"]
    assert out_of_memory(None) == []
