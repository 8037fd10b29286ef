"""What a training would take and cost, against what was measured."""

import pytest

from remote.cloud.estimate import Work


@pytest.mark.parametrize(("tokens", "measured_s"), [(3880, 193.3), (2540, 163.1)])
def test_the_estimate_is_near_what_whole_runs_took(tokens, measured_s):
    """192 samples, three epochs, without an evaluation, on an H100 and an H200 (docs/benchmarks.md)."""
    assert Work(192, 0, 3, tokens).seconds("H100 (80 GB SXM5)") == pytest.approx(measured_s, rel=0.25)


def test_other_cards_go_by_their_arithmetic_and_unknown_ones_have_none():
    work = Work(2000, 500, 20, 3880)
    fast, same, slow, slower = (work.seconds(name) for name in ("B200 (180 GB SXM6)", "GH200 (96 GB)",
                                                                "H100 (80 GB PCIe)", "A10 (24 GB PCIe)"))  # fmt: skip
    assert fast < same < slow < slower and same == work.seconds("H100 (80 GB SXM5)")
    assert work.seconds("Tesla V100 (16 GB)") is None and work.seconds("A1000") is None
    assert Work(4000, 1000, 20, 3880).seconds("H100") > 1.9 * same
