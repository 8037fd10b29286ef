"""The merge screen's rows: one line each at any width, finished shards at 100 %."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("textual")
from surgvqa.config.workspace import load_workspace
from tui.content import report, scores
from tui.follow.run_model import RunModel
from tui.screens.merge import target_problems
from tui.session import Session
from tui.settings.settings import Settings
from tui.settings.upload_plan import file_plan
from tui.targets.local import LocalTarget

GB = 10**9


def merging(shards: int = 4) -> RunModel:
    """A merge of 5 GB shards, half way through its second; what was told of the first ends before its end."""
    model = RunModel()
    events: list[dict[str, Any]] = [{"t": 0.0, "kind": "phase", "name": "merge", "text": f"{shards} shards"}]
    names = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    for t, done in enumerate((0.0, 2.5, 4.95, 5.2, 7.5)):
        at = int(done // 5)
        part = {"shard": names[at], "shard_done": (done - 5 * at) * GB, "shard_total": 5 * GB}
        events.append(
            {"t": 60.0 * t, "kind": "progress", "phase": "merge", "unit": "bytes", "done": done * GB, **part}
            | {"total": 5 * GB * shards}
        )
    events.insert(-2, {"t": 170.0, "kind": "shard", "file": names[0], "bytes": 5 * GB, "sha256": "0", "done": 1})
    model.feed([{"v": 1, **e} for e in events])
    return model


@pytest.mark.parametrize("width", [116, 76, 66])
def test_progress_of_a_merge_fits_its_lines(width: int) -> None:
    follower = SimpleNamespace(model=merging(), state="running")
    text = report.job_progress(follower, width).plain  # type: ignore[arg-type]  # a stand-in
    rows = text.split("\n")
    assert all(len(row) <= width for row in rows), text
    first, second = (next(r for r in rows if r.startswith(f"shard {i} of 4")) for i in (1, 2))
    assert "100 %" in first and "left" not in first
    assert "50 %" in second and "left" in second and "2.5 GB" in second
    assert ("MB/s" in second) == (width > 70)


def test_a_shard_of_another_name_keeps_it() -> None:
    assert report.shard_name("model-00012-of-00100.safetensors") == "shard 12 of 100"
    assert report.shard_name("model.safetensors") == "model.safetensors"


@pytest.mark.parametrize("width", [116, 76])
def test_planned_shards_fit_their_lines(width: int) -> None:
    shards = [{"file": f"model-{i:05d}-of-00012.safetensors", "bytes": 5 * GB, "tensors": 1300} for i in range(1, 13)]
    rows = [row.plain for row in report.shard_rows(shards, width)]
    assert all(len(row) <= width for row in rows), rows
    assert "model-00008-of-00012.safetensors" in rows[7] and "1,300 tensors" in rows[7]
    assert rows[8].strip() == "and 4 more"


def test_the_report_names_the_slowest_kind() -> None:
    kinds = [{"kind": "down_proj", "modules": 28, "seconds": 65.0}, {"kind": "q_proj", "modules": 28, "seconds": 10.0}]
    text = report.merge_report({"by_kind": kinds}, 100).plain
    assert "1 min 15 s of all threads; down_proj the most, 1 min 05 s for 28" in text
    for row in kinds:
        del row["seconds"]  # a report from before they were told
    assert "threads" not in report.merge_report({"by_kind": kinds}, 100).plain


def test_what_to_do_next_is_said() -> None:
    """After the merge, and after an audit that found nothing."""
    assert "3 to Train" in report.merge_report({}, 100).plain
    assert "3 to Train" in report.audit({"ok": True}).plain
    assert "3 to Train" not in report.audit({"ok": False}).plain


def test_types_of_different_counts_stand_below_each_other() -> None:
    types = {name: {"n": n, "keyword_accuracy": 0.5, "majority_accuracy": 0.5} for name, n in (("a", 8), ("b", 120))}
    rows = scores.evaluation({"by_type": types}, 100).plain.splitlines()[1:]
    assert len({row.index("majority") for row in rows}) == 1


def test_an_occupied_target_is_known_before_the_merge(tmp_path):
    assert target_problems(tmp_path / "new") == []
    (tmp_path / "empty").mkdir()
    assert target_problems(tmp_path / "empty") == []
    (tmp_path / "file").touch()
    assert "is a file" in target_problems(tmp_path / "file")[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    assert "holds something else" in target_problems(tmp_path / "other")[0]
    (tmp_path / "other" / "merge_report.json").touch()
    assert "holds a merged checkpoint" in target_problems(tmp_path / "other")[0]


def test_the_checkpoint_just_merged_is_carried_on(root):
    workspace = load_workspace(root)
    session = Session(LocalTarget(workspace))
    session.merged(root / "elsewhere")
    settings = Settings("train", workspace, session.edited["train"])
    assert settings.resolve(None)[0].options.model_name_or_path == "elsewhere"
    assert file_plan(workspace, session.checkpoint)[0].path == str(root / "elsewhere")
    (root / "surgvqa.toml").write_text('model_name_or_path = "merged"\n')
    session.here.workspace = load_workspace(root)
    session.merged(root / "merged")  # what surgvqa.toml names: nothing is edited
    assert session.checkpoint is None and session.edited["train"] == {}
