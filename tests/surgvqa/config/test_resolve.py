"""The sources of a setting, laid over each other, and what a wrong one says."""

import pytest

from surgvqa.config.options import COMMAND_OPTIONS, MergeOptions, TrainOptions
from surgvqa.config.resolve import resolve
from surgvqa.config.settings import convert, require_bounds, settings_of
from surgvqa.config.workspace import WORKSPACE_FILE, find_workspace, load_workspace
from surgvqa.errors import UsageError

MERGE = {"stage1_model_path": "a", "stage2_adapter_path": "b"}
TRAIN = {"model_name_or_path": "m", "train_data_path": "t", "frames_dir": "f", "audio_dir": "a"}


def workspace(folder, text=""):
    (folder / WORKSPACE_FILE).write_text(text)
    return load_workspace(folder)


def test_each_source_lies_over_the_one_below(tmp_path):
    space = workspace(tmp_path, "learning_rate = 1e-3\nnum_frames = 4\n[evaluate]\nnum_frames = 2\n")
    resolved = resolve("train", {**TRAIN, "seed": 7}, space, preset="oom-6f-384px")
    assert (resolved.options.image_size, resolved.sources["image_size"]) == (384, "preset oom-6f-384px")
    assert (resolved.options.num_frames, resolved.sources["num_frames"]) == (4, "surgvqa.toml")
    assert (resolved.options.seed, resolved.sources["seed"]) == (7, "command line")
    assert (resolved.options.lora_r, resolved.sources["lora_r"]) == (64, "default")
    assert resolve("evaluate", {}, space).options.num_frames == 2, "a command's own table wins"


def test_the_first_preset_applies_when_none_is_named(tmp_path):
    assert resolve("train", TRAIN, workspace(tmp_path)).preset == "baseline-8f-512px"


def test_paths_of_the_file_belong_to_the_workspace(tmp_path):
    space = workspace(tmp_path, 'train_data_path = "data/train.jsonl"')
    assert space.value("train_data_path", "train") == str(tmp_path / "data" / "train.jsonl")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lerning_rate = 1", "did you mean learning_rate?"),
        ("[trian]\nseed = 1", "unknown table [trian]"),
        ("[merge]\nseed = 1", "unknown key [merge] seed"),
        ('seed = "many"', "expected a whole number"),
        ("num_frames = 6.5", "expected a whole number"),
        ('bf16 = "perhaps"', "expected true or false"),
        ('device = "tpu"', "expected one of auto, cpu, cuda"),
        ("seed = [1]", "expected one int"),
        ("seed = ", "not valid TOML"),
    ],
)
def test_a_bad_workspace_file_is_named_with_the_key(tmp_path, text, said):
    with pytest.raises(UsageError) as error:
        workspace(tmp_path, text)
    assert said in str(error.value) and WORKSPACE_FILE in str(error.value)
    assert "\n" not in str(error.value) or "TOML" in str(error.value)


def test_what_is_missing_is_named_at_once(tmp_path):
    with pytest.raises(UsageError, match="--stage1_model_path, --stage2_adapter_path"):
        resolve("merge", {}, workspace(tmp_path))


def test_a_budget_is_that_of_the_training_described(tmp_path):
    (tmp_path / "stage1").mkdir()
    text = '[merge]\nstage1_model_path = "stage1"\n[train]\nmodel_name_or_path = "merged"\nlora_r = 8\n'
    space = workspace(tmp_path, text)
    options = resolve("budget", {}, space).options
    assert options.lora_r == 8
    assert options.model_name_or_path == str(tmp_path / "stage1"), "before the merge the sizes are the base's"
    (tmp_path / "merged").mkdir()
    assert resolve("budget", {}, space).options.model_name_or_path == str(tmp_path / "merged")


def test_an_unknown_preset_names_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="did you mean oom-6f-512px"):
        resolve("train", TRAIN, workspace(tmp_path), preset="oom-6f-513px")


def test_the_workspace_is_found_from_below(tmp_path):
    workspace(tmp_path)
    below = tmp_path / "runs" / "x"
    below.mkdir(parents=True)
    assert find_workspace(below) == tmp_path
    assert find_workspace(tmp_path.parent) == tmp_path.parent


def test_run_json_records_where_every_value_came_from(tmp_path):
    record = resolve("train", TRAIN, workspace(tmp_path), extra={"weight_decay": "0.1"}).record()
    assert record["frames_dir"] == {"value": TRAIN["frames_dir"], "from": "command line"}
    assert record["lora_r"]["from"] == "default"
    assert record["weight_decay"] == {"value": "0.1", "from": "command line"}


def test_every_option_says_what_it_is():
    for options_class in COMMAND_OPTIONS.values():
        for setting in settings_of(options_class).values():
            assert setting.help, f"{options_class.__name__}.{setting.name} has no help"


def test_workspace_presets_replace_those_that_a_run_steps_down_through(tmp_path):
    import presets

    assert [p.rung for p in presets.step_down_presets()] == [0, 1, 2, 3, 4]
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "small.toml").write_text(
        'reason = "r"\ngives_up = "g"\nrung = 0\n[settings]\nnum_frames = 2\n'
    )
    assert [p.name for p in presets.step_down_presets(tmp_path)] == ["small"]
    assert presets.load_presets(tmp_path)[0].name == "small"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'reason = "r"\n', "gives_up is missing, expected text"),
        (b'reason = "r"\ngives_up = "g"\nrung = "1"\n[settings]\n', "rung is '1', expected a whole number"),
        (b'reason = 1\ngives_up = "g"\n[settings]\n', "reason is 1, expected text"),
        (b'reason = "r"\ngives_up = "g"\nsettings = 3\n', "settings is 3, expected a table"),
        (b"reson = 1\n", "unknown key reson"),
        (b'reason = "\xff"\n', "not valid TOML"),
        (b"a = " + b"[" * 3000, "not valid TOML"),
    ],
)
def test_a_bad_preset_names_its_file_and_key(tmp_path, text, problem):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "bad.toml").write_bytes(text)
    with pytest.raises(UsageError) as caught:
        resolve("train", TRAIN, workspace(tmp_path))
    assert "bad.toml" in str(caught.value) and problem in str(caught.value)


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_settings_are_read_however_they_were_saved(tmp_path, before, end):
    (tmp_path / "presets").mkdir()
    lines = (b'reason = "r"', b'gives_up = "g"', b"[settings]", b"num_frames = 2", b"")
    (tmp_path / "presets" / "own.toml").write_bytes(before + end.join(lines))
    (tmp_path / WORKSPACE_FILE).write_bytes(before + b'preset = "own"' + end + b"seed = 7" + end)
    options = resolve("train", TRAIN, load_workspace(tmp_path)).options
    assert (options.seed, options.num_frames) == (7, 2)


@pytest.mark.parametrize(
    ("content", "problem"),
    [("seed = 7".encode("utf-16"), "UTF-16"), (b'run_name = "caf\xe9"', "byte 16 is not UTF-8"), (b"[" * 9999, "TOML")],
)
def test_a_workspace_file_that_is_no_text_says_so(tmp_path, content, problem):
    (tmp_path / WORKSPACE_FILE).write_bytes(content)
    with pytest.raises(UsageError, match=f"surgvqa.toml: .*{problem}"):
        load_workspace(tmp_path)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_a_number_is_finite(tmp_path, number):
    with pytest.raises(UsageError, match=r"budget_gb is .*expected a number"):
        workspace(tmp_path, f"budget_gb = {number}")
    with pytest.raises(UsageError, match="expected a whole number"):
        convert(settings_of(TrainOptions)["seed"], number, "command line")


@pytest.mark.parametrize("value", ["1979-05-27", "07:32:00", "true", "[1]", "{a = 1}", "[[1]]", "9" * 400, "9" * 5000])
@pytest.mark.parametrize("key", ["seed", "learning_rate", "run_name", "frames_dir", "optim", "bf16", "budget_gb"])
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(tmp_path, key, value):
    try:
        workspace(tmp_path, f"[train]\n{key} = {value}")
    except UsageError as error:
        assert (
            str(error).count("\n") == 0 and "surgvqa.toml" in str(error) and (key in str(error) or "TOML" in str(error))
        )


def test_a_wrong_type_is_named_in_plain_words(tmp_path):
    with pytest.raises(UsageError, match=r"frames_dir is \['a'\], expected one path$"):
        workspace(tmp_path, 'frames_dir = ["a"]')


def test_a_workspace_file_that_cannot_be_read_says_so(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / WORKSPACE_FILE).write_text("seed = 1")
    monkeypatch.setattr("pathlib.Path.read_text", refused)
    with pytest.raises(UsageError, match=r"surgvqa\.toml: Permission denied"):
        load_workspace(tmp_path)


def test_a_home_is_filled_in_where_the_shell_does_not(monkeypatch):
    """bash leaves --stage1_model_path=~/stage1 as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    known = settings_of(MergeOptions)["stage1_model_path"]
    assert convert(known, "~/stage 1", "command line") == "/home/me/stage 1"
    assert convert(known, "a/~", "command line") == "a/~"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lora_r", 0, "at least 1"),
        ("learning_rate", 0.0, "more than 0"),
        ("warmup_ratio", 1.0, "at least 0 and less than 1"),
    ],
)
def test_a_number_out_of_its_bounds_is_named_with_its_source(tmp_path, name, value, expected):
    (tmp_path / "surgvqa.toml").write_text(f"{name} = {value}\n")
    resolved = resolve("train", TRAIN, load_workspace(tmp_path))
    with pytest.raises(UsageError, match=f"^surgvqa.toml: {name} is {value:g}, expected {expected}$"):
        require_bounds(resolved.options, resolved.sources)


def test_every_number_says_what_it_may_be():
    """Only these have no bound of their own: what they may be depends on other options or on the checkpoint."""
    free = {"max_steps", "num_train_epochs", "checkpointed_layers"}
    numbers = {
        name: setting
        for options_class in COMMAND_OPTIONS.values()
        for name, setting in settings_of(options_class).items()
        if setting.type in (int, float)
    }
    assert {name for name, setting in numbers.items() if not str(setting.bounds)} == free
