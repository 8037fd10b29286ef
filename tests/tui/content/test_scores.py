"""What the panel says of data."""

from tui.content import scores


def test_the_data_check_says_what_is_wrong_what_misleads_and_what_was_not_looked_at():
    found = {"ok": True, "samples": 5200, "majority_accuracy": 0.648, "wordings": {"tool": 1, "light": 1}}
    found |= {"shared_clips": 18, "missing_frames": None, "contradictions_list": ["a:1"], "not_checked": ["frames"]}
    assert scores.data_check(found).plain.splitlines() == [
        "✓ 5,200 samples, always the most frequent answer: 64.8 %",
        "! 18 clips in training and evaluation",
        "! 1 samples whose label contradicts another's",
        "! 2 wordings, one a type: all that listening has to tell apart",
        "not looked at: frames",
    ]
    assert scores.data_check({"ok": False, "samples": 3, "wordings": {"tool": 2}}).plain == "✗ 3 samples"
