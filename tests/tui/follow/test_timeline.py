"""The timeline: entries from events, between them the process's own lines, in the order of time."""

from hypothesis import given
from hypothesis import strategies as st

from tui.content.source import output_around, source_line
from tui.follow.timeline import KEPT, Timeline, shown

EVENTS = [
    {"kind": "phase", "t": 10.0, "name": "load model", "text": "merged"},
    {"kind": "metric", "t": 11.0, "step": 1, "loss": 2.0},
    {"kind": "eval", "t": 12.0, "step": 5, "eval_loss": 0.9, "eval_keyword_accuracy": 0.5, "eval_runtime": 3.0},
    {"kind": "checkpoint", "t": 12.5, "step": 5, "path": "checkpoints/checkpoint-5"},
    {"kind": "oom", "t": 13.0, "step": 6, "text": "tried to allocate 2.1 GB"},
    {"kind": "retreat", "t": 13.1, "step": 6, "settings": {"checkpointed_layers": 4}},
    {"kind": "preset", "t": 13.2, "step": 6, "name": "oom-6f-384px", "settings": {"num_frames": 6}},
    {"kind": "warning", "t": 14.0, "text": "slow\ndisk"},
    {"kind": "error", "t": 15.0, "text": "ValueError: no such frame"},
    {"kind": "finished", "t": 15.0, "state": "failed"},
]


def test_events_become_entries_with_level_and_step():
    timeline = Timeline()
    timeline.add(EVENTS, [], now=20.0)
    assert [(entry.level, entry.text, entry.step) for entry in timeline.entries] == [
        ("event", "load model: merged", None),
        ("good", "evaluated at step 5: loss 0.9, keyword accuracy 0.5", 5),
        ("good", "checkpoint checkpoints/checkpoint-5", 5),
        ("error", "out of GPU memory at step 6: tried to allocate 2.1 GB", 6),
        ("warning", "stepped down: checkpointed_layers 4", 6),
        ("warning", "preset oom-6f-384px: num_frames 6", 6),
        ("warning", "slow disk", None),
        ("error", "ValueError: no such frame", None),
        ("error", "failed", None),
    ]
    assert [sum(shown(entry, level) for entry in timeline.entries) for level in (0, 1, 2)] == [9, 9, 6]


def test_lines_of_output_stand_where_they_belong():
    timeline = Timeline()
    raised = ["Traceback (most recent call last)", "ValueError: no such frame"]
    timeline.add(EVENTS[-2:] + EVENTS[:1], ["loading", *raised], now=20.0, began=9.0)
    assert [entry.text for entry in timeline.entries][:2] == ["loading", "load model: merged"]
    assert [entry.text for entry in timeline.entries][2:4] == raised
    version = timeline.version
    timeline.add([{"kind": "warning", "t": 25.0, "text": "hot"}], ["a line"], now=26.0)
    assert [entry.text for entry in timeline.entries][-2:] == ["hot", "a line"] and timeline.version == version
    timeline.add([{"kind": "warning", "t": 5.0, "text": "from another clock"}], [], now=27.0)
    assert timeline.entries[0].text == "from another clock" and timeline.version > version


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 2)), max_size=60))
def test_entries_are_always_in_order(looks):
    timeline = Timeline()
    for t, lines in looks:
        timeline.add([{"kind": "warning", "t": t, "text": "w"}], ["line"] * lines, now=t, began=1.0)
    orders = [entry.order for entry in timeline.entries]
    assert orders == sorted(orders)


def test_a_timeline_is_bounded():
    timeline = Timeline()
    for _ in range(20):
        timeline.add([], ["x"] * 1000, now=1.0)
    assert 0 < len(timeline.entries) <= KEPT


def test_an_error_opens_its_place_in_the_output_and_its_line_in_the_file(tmp_path):
    timeline = Timeline()
    lines = ["loading", "Traceback (most recent call last)", "  at frames.py", "ValueError: no such frame"]
    timeline.add(EVENTS, lines, now=20.0, began=9.0)
    error = next(entry for entry in timeline.entries if entry.text == lines[-1] and entry.level == "error")
    same, around = output_around(timeline.entries, error)
    assert same.level == "output" and same.text == lines[-1] and [line.text for line in around] == lines
    (tmp_path / "train.jsonl").write_text('{"id": 1}\n{"id": \x1b2}\n')
    assert source_line("train.jsonl:2: not JSON", tmp_path) == ("train.jsonl, line 2", '{"id": \\x1b2}')
    assert source_line("train.jsonl:9: not JSON", tmp_path) is None
    assert source_line("../../etc/hosts.txt:1: no", tmp_path) is None
    assert source_line("/etc/ssl/openssl.txt:1: no", tmp_path) is None
