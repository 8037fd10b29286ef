"""How many processes train: what --gpus asks for, and what can be seen here."""

from types import SimpleNamespace

import pytest

from surgvqa.cli import ranks
from surgvqa.cli.main import main
from surgvqa.config.options import TrainOptions
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs.ranks import Nodes, nodes_asked


@pytest.fixture
def cards(monkeypatch):
    """Three cards, one of which is lost, and an instance of a fourth."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that what a test leaves there is taken back
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    found = [{"index": 0}, {"index": 1, "state": "ok"}, {"index": 2, "state": "lost"}, {"index": 3, "mig_index": 0}]
    monkeypatch.setattr(ranks.gpu, "sample_devices", lambda: found)
    return found


def asked(gpus: str, device: str = "auto") -> int:
    return ranks.how_many(SimpleNamespace(gpus=gpus, device=device))


def test_one_process_a_card_that_works(cards, monkeypatch):
    assert (asked("1"), asked("2"), asked("all"), asked("ALL ")) == (1, 2, 2, 2)
    assert (asked("4", "cpu"), asked("all", "cpu")) == (4, 1)
    with pytest.raises(UsageError, match="gpus is 3, and 2 can be seen here"):
        asked("3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert asked("all") == 1
    cards.clear()
    assert asked("all") == 1
    with pytest.raises(UsageError, match="gpus is 2, and none can be seen here"):
        asked("2")


@pytest.mark.parametrize(
    ("visible", "count", "seen"),
    [
        (None, 2, "1"),
        ("3,5", 2, "5"),
        ("GPU-a, GPU-b,GPU-c", 3, "GPU-b"),
        ("0", 2, "0"),  # fewer cards than ranks
        (None, 1, None),
        ("0,1,2,9", 2, "0,1,2,9"),  # one of them is not there
    ],
)
def test_a_rank_sees_its_own_card_alone(cards, monkeypatch, visible, count, seen):
    cards[2:] = [{"index": 2}]
    monkeypatch.setenv("LOCAL_RANK", "1" if count > 1 else "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    ranks.see_own_card()
    assert ranks.os.environ.get("CUDA_VISIBLE_DEVICES") == seen
    ranks.see_own_card()  # again, for a process that a rank starts
    assert ranks.os.environ.get("CUDA_VISIBLE_DEVICES") == seen


@pytest.mark.parametrize("visible", [None, "0,1"])
def test_numbers_of_cards_are_left_alone_where_one_is_lost(cards, monkeypatch, visible):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    ranks.see_own_card()
    assert ranks.os.environ.get("CUDA_VISIBLE_DEVICES") == (visible and "1")


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", ""])
def test_what_is_no_number_of_gpus_is_one_line(text):
    with pytest.raises(UsageError, match="expected a number of GPUs, or all"):
        asked(text)


def test_torchrun_is_for_train_alone(monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert main(["presets"]) == 2
    assert "torchrun starts presets several times over" in capsys.readouterr().err


def test_ranks_that_were_killed_are_named_where_none_could_say_it():
    def failed(**codes):
        return {int(rank[1:]): SimpleNamespace(exitcode=code, timestamp=7 + code) for rank, code in codes.items()}

    with pytest.raises(SurgvqaError, match=r"rank 1 was killed \(SIGKILL; out of host memory\?\)"):
        ranks._killed_first(failed(r0=-15, r1=-9))
    with pytest.raises(SurgvqaError, match=r"rank 0 was killed \(SIGSEGV\)"):
        ranks._killed_first(failed(r0=-11, r1=1))
    assert ranks._killed_first(failed(r0=1, r1=-15)) == 1


def test_the_machines_are_those_that_torchruns_variables_name(monkeypatch):
    monkeypatch.delenv("PET_NNODES", raising=False)
    assert nodes_asked() is None
    asked = Nodes(2, 1, "10.0.0.1:29500", "x")
    for name, value in asked.environment().items():
        monkeypatch.setenv(name, value)
    assert nodes_asked() == asked
    for wrong in ("2", "-1", "one", ""):
        monkeypatch.setenv("PET_NODE_RANK", wrong)
        with pytest.raises(UsageError, match="PET_NNODES is '2'"):
            nodes_asked()


def test_what_lies_in_rank_0s_workspace_is_looked_for_in_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {"model_name_or_path": "/there/ws/merged", "train_data_path": "train.jsonl", "frames_dir": "/data/frames"}
    options = TrainOptions(**paths, audio_dir="/there/ws-2/audio")
    ranks._bring_here(options, "/there/ws")
    assert options.model_name_or_path == str(tmp_path / "merged") and options.train_data_path == "train.jsonl"
    assert (options.frames_dir, options.audio_dir) == ("/data/frames", "/there/ws-2/audio")
