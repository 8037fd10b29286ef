"""What doctor says of the GPUs together; between two processes on the CPU, over gloo."""

import pytest

from surgvqa.machine import all_reduce

pytest.importorskip("torch")


@pytest.mark.model
def test_two_processes_reach_each_other():
    found = all_reduce.check_all_reduce(2, cpu=True)
    assert found.name == "GPUs together" and found.status in ("ok", "warn"), found
    assert "an all-reduce between 2 GPUs: " in found.text and "GB/s" in found.text


@pytest.mark.parametrize(
    ("out", "err", "status", "text"),
    [
        ('noise\n{"gb_per_s": 180.2, "ranks": 2}', "", "ok", "180.2 GB/s each"),
        ('{"gb_per_s": 0.4}', "", "warn", "training waits for it"),
        ("{}", "x\nRuntimeError: NCCL unhandled\n", "bad", "fails: RuntimeError: NCCL unhandled"),
        ("", "", "bad", "no reason given"),
    ],
)
def test_what_the_processes_say_is_judged(out, err, status, text):
    found = all_reduce.read_output("an all-reduce", "mend", out, err)
    assert found.status == status and text in found.text
    assert "mend" in found.mend or status == "ok"


@pytest.mark.model
def test_an_all_reduce_that_hangs_is_cut_short(monkeypatch):
    monkeypatch.setattr(all_reduce, "WITHIN_S", 1.5)
    found = all_reduce.check_all_reduce(2, cpu=True)
    assert found.status == "bad" and "does not end" in found.text and "NCCL_P2P_DISABLE" in found.mend
