"""What the gauge says of a GPU beside the run's own."""

import pytest

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
