"""What was typed in the panel goes to surgvqa.toml, whose comments and order stay."""

import pytest

from surgvqa.config.workspace import load_workspace
from surgvqa.errors import UsageError
from tui.settings.save import save

FILE = """# our settings
preset = "baseline-8f-512px"  # until the GPU is larger
frames_dir = "frames"

[train]
# tried 1e-4: slower
learning_rate = 0.0002
"""


def test_comments_stay_and_keys_go_where_they_are(tmp_path):
    (tmp_path / "surgvqa.toml").write_text(FILE)
    workspace = load_workspace(tmp_path)
    edited = {"learning_rate": "1e-4", "frames_dir": "other frames", "max_steps": "60", "enforce_budget": "false"}
    assert save(workspace, "train", edited, "oom-6f-384px") == ["preset", *edited]
    assert (tmp_path / "surgvqa.toml").read_text() == (
        '# our settings\npreset = "oom-6f-384px"  # until the GPU is larger\nframes_dir = "other frames"\n\n'
        "[train]\n# tried 1e-4: slower\nlearning_rate = 0.0001\nmax_steps = 60\nenforce_budget = false\n"
    )
    assert workspace.preset == "oom-6f-384px" and workspace.value("max_steps", "train") == 60
    assert not list(tmp_path.glob("*.part"))


def test_a_workspace_without_a_file_gets_one(tmp_path):
    workspace = load_workspace(tmp_path)
    save(workspace, "merge", {"output_path": "merged"})
    assert (tmp_path / "surgvqa.toml").read_text() == '[merge]\noutput_path = "merged"\n'
    assert save(workspace, "train", {"seed": "7"}, "x") == ["preset", "seed"]
    assert load_workspace(tmp_path).value("seed", "train") == 7 and load_workspace(tmp_path).preset == "x"


def test_a_file_that_is_no_toml_stays_as_it_is(tmp_path):
    workspace = load_workspace(tmp_path)
    (tmp_path / "surgvqa.toml").write_text("a = = 1\n")
    with pytest.raises(UsageError, match="not valid TOML"):
        save(workspace, "train", {"seed": "7"})
    assert (tmp_path / "surgvqa.toml").read_text() == "a = = 1\n"
