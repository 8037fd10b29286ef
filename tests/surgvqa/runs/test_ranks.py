"""The folders of a run on several machines."""

from surgvqa.runs.folder import Run
from surgvqa.runs.history import find_run
from surgvqa.runs.ranks import node_run, run_of


def test_each_further_machine_has_a_folder_named_after_the_run():
    assert [node_run("r", node) for node in (0, 1, 12)] == ["r", "r-node1", "r-node12"]
    assert [run_of(name) for name in ("r", "r-node1", "r-node12", "r-node0", "r-node1-x")] == [
        "r", "r", "r", "r-node0", "r-node1-x"
    ]  # fmt: skip


def test_on_a_shared_disk_the_run_itself_is_meant(tmp_path):
    """The other machine begins later, with the same name and options."""
    named = {"run_name": {"value": "both", "from": "command line"}}
    run = Run.create(tmp_path, "train", run_id="20260101-000000-train-a", options=named).folder
    further = Run.create(tmp_path, "train", run_id=node_run(run.name, 1), options=named).folder
    assert [find_run(name, [tmp_path]) for name in ("last", "both", "20260101", run.name)] == [run] * 4
    assert find_run(further.name, [tmp_path]) == further


def test_where_only_a_further_machines_folder_is_it_is_found(tmp_path):
    further = Run.create(tmp_path, "train", run_id="20260101-000000-train-a-node1").folder
    assert [find_run(name, [tmp_path]) for name in ("last", "20260101", further.name)] == [further] * 3
