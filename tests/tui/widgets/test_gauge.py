"""What the gauge says of a GPU beside the run's own."""

import pytest

from tui.follow.run_model import RunModel
from tui.widgets.gauge import Gauge


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ({"index": "1", "state": "lost", "problem": "GPU is lost"}, "GPU 1 lost: GPU is lost"),
        ({"index": "0.2", "state": "ok", "used_bytes": 2e9, "total_bytes": 40e9}, "2.0 GB of 40.0 GB"),
        ({"index": "1"}, "memory unknown"),
    ],
)
def test_each_gpu_shows_its_state(gpu, said):
    (line,) = Gauge()._further(gpu, 60)
    assert said in line.plain


def shown(hosts=(), waits=(), compact=False, **changes) -> list[str]:
    """The lines of two ranks, the second of which has a small card."""
    model = RunModel()
    sample = {"kind": "gpu", "backend": "cuda", "process_bytes": 20e9, "total_bytes": 80e9, **changes}
    model.feed([{"kind": "ranks", "hosts": list(hosts)}, {**sample, "device": 0}])
    model.feed([{**sample, "device": 1, "rank": 1, "total_bytes": 24e9}])
    gauge = Gauge()
    gauge.show = lambda content: None
    gauge.show_devices(model.devices, 28.5e9, {}, compact, hosts=model.hosts, waits=waits)
    return gauge._content(60).plain.splitlines()


def test_each_rank_has_a_row_and_its_own_budget():
    lines = shown()
    assert len(lines) == 4 and "━" in lines[1] + lines[3]
    assert lines[0].startswith("GPU 0  20.0 of 28.5 GB") and lines[2].startswith("GPU 1  20.0 of 24.0 GB")
    assert [line.partition(" ")[0] for line in shown(backend="host")[::2]] == ["rank"] * 2


def test_the_ranks_of_a_host_stand_below_its_name_and_the_slowest_is_named():
    lines = shown(["one", "two"], [0.31, 0.0])
    assert lines[0] == "one" and lines[3] == "two"
    assert "waits 31 %" in lines[1] and "slowest" in lines[4]
    first, second = shown(["one", "two"], [0.31, 0.0], compact=True)
    assert first.startswith("one GPU 0") and second.startswith("two GPU 1") and "━" in first
    assert not any("slowest" in line for line in shown(waits=[0.001, 0.0]))


def test_a_card_of_the_run_is_no_further_one():
    others = [{"index": index, "total_bytes": 80e9} for index in (0, 1, 2)]
    assert [line[:5] for line in shown(other_gpus=others)[4:]] == ["GPU 2"]


def test_what_a_damaged_event_says_of_ranks_is_passed_over():
    model = RunModel()
    model.feed([{"kind": "ranks", "hosts": 7}, {"kind": "metric", "step": 1, "rank_wait": 3}])
    model.feed([{"kind": "gpu", "rank": rank} for rank in ("x", -1, 1 << 40)])
    assert model.hosts == [] and model.devices == {} and model.rank_waits == [] and model.step == 1
