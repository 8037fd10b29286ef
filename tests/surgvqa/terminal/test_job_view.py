"""What a job's events look like on a terminal."""

import io

from surgvqa.terminal.job_view import JobView


def shown(*events: dict) -> str:
    stream = io.StringIO()
    view = JobView(stream)
    for event in events:
        view.show(event)
    view.close()
    return stream.getvalue()


def test_the_rate_counts_what_this_phase_did_not_what_it_found():
    text = shown(
        {"kind": "phase", "name": "train"},
        {"kind": "progress", "phase": "train", "done": 90, "total": 96, "unit": "steps", "t": 1000.0},
        {"kind": "progress", "phase": "train", "done": 96, "total": 96, "unit": "steps", "t": 1003.0},
    )
    assert "96 of 96 steps, 2.00/s" in text and "32.00/s" not in text


def test_the_time_left_is_what_is_left_at_that_rate():
    view = JobView(stream := io.StringIO())
    view.show({"kind": "progress", "phase": "upload", "done": 4e9, "total": 9e9, "unit": "bytes", "t": 0.1})
    view.last_line = 0.0
    view.show({"kind": "progress", "phase": "upload", "done": 5e9, "total": 9e9, "unit": "bytes", "t": 10.1})
    assert "5.0 GB of 9.0 GB, 100.0 MB/s, 40 s left" in stream.getvalue()


def test_one_event_alone_tells_no_rate():
    text = shown({"kind": "progress", "phase": "scan", "done": 7, "total": 7, "unit": "files", "t": 5.0})
    assert text.strip() == "scan: 7 of 7 files"


def test_an_evaluation_is_one_line_of_what_the_model_can_do():
    path = "/a/long/path/" + "x" * 100
    text = shown(
        {"kind": "eval", "step": 70, "eval_loss": 5.675, "eval_keyword_accuracy": 0.62, "eval_runtime": 1.8},
        {"kind": "checkpoint", "path": path},
    )
    assert text.splitlines() == [
        "  evaluation at step 70  eval_loss 5.675  eval_keyword_accuracy 0.62",
        f"  checkpoint {path}",
    ]


def test_a_plan_says_what_each_choice_does_to_the_peak():
    choices = [{"text": "8-bit AdamW", "saves_gb": 0.96}, {"text": "no layer recomputes", "saves_gb": -9.9}]
    stream = io.StringIO()
    JobView(stream).show({"kind": "phase", "name": "plan", "text": "48 steps", "choices": choices})
    assert stream.getvalue() == "plan 48 steps\n    1.0 GB less: 8-bit AdamW\n    9.9 GB more: no layer recomputes\n"


def test_a_damaged_event_is_passed_over():
    """Kinds that are known, without their fields; and a kind that is a method's name."""
    text = shown(
        *({"kind": kind} for kind in ("phase", "progress", "metric", "eval", "warning", "output", "oom", "say", 5)),
        {"kind": "progress", "phase": "merge", "done": "x", "total": 7},
        {"kind": "metric", "step": 3, "loss": "abc"},
        {"kind": "warning", "text": "still here"},
    )
    assert "still here" in text and "kind" not in text
