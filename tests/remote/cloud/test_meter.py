"""What a run costs while it is followed."""

from remote.cloud import meter
from remote.cloud.meter import Meter


def test_cost_so_far_at_the_end_and_time_left():
    meter = Meter(2.0, since=1000.0)
    meter.see({"kind": "metric", "t": 2800.0, "step": 1, "total_steps": 101, "loss": 2.0})
    meter.see({"kind": "metric", "t": "soon", "step": 5, "total_steps": 101})
    assert meter.figures(2800.0) == {"cost": 1.0, "cost_at_end": None, "left_s": None, "price_per_hour": 2.0}
    meter.see({"kind": "metric", "t": 2980.0, "step": 11, "total_steps": 101, "loss": 2.0})
    assert meter.figures(2980.0) == {"cost": 1.1, "cost_at_end": 2.0, "left_s": 1620.0, "price_per_hour": 2.0}
    assert meter.line(2980.0) == "$1.10 so far, $2.00 at its end, 27 min 00 s left"


def test_a_host_that_was_not_rented_counts_the_run_alone():
    meter = Meter(3.6)
    meter.see({"kind": "phase", "t": 50.0, "name": "train"})
    assert meter.figures(1050.0)["cost"] == 1.0 and meter.line(1050.0) == "$1.00 so far"


def test_cost_per_point_needs_both_accuracies_and_more_than_the_majority():
    scores = {"keyword_accuracy": 0.8, "majority_accuracy": 0.5}
    assert meter.cost_per_point(6.0, scores) == 0.2
    assert meter.cost_per_point(6.0, scores | {"label_accuracy": 0.7}) == 0.3  # the stricter one, where it is known
    assert meter.cost_per_point(6.0, scores | {"label_accuracy": 0.5}) is None
    assert meter.cost_per_point(6.0, {"keyword_accuracy": 0.8}) is None
    assert meter.points_above_majority(scores | {"majority_accuracy": float("nan")}) is None
