"""The optimiser that is taken, and what is said when it is not the one that was meant."""

import functools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from surgvqa.config.options import TrainOptions  # noqa: E402
from surgvqa.errors import UsageError  # noqa: E402
from surgvqa.training import recipe  # noqa: E402
from surgvqa.training.arguments import bitsandbytes_problem, choose_optimiser, training_arguments  # noqa: E402

pytestmark = pytest.mark.model

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class Broken:
    """Finds bitsandbytes, whose import raises."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes":
            raise self.error


@pytest.fixture(params=[RuntimeError("\n\nCUDA Setup failed\nmore"), AssertionError(), OSError("libcudart.so.13")])
def broken(request, monkeypatch):
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(request.param), *sys.meta_path])
    return request.param


def test_a_broken_bitsandbytes_is_named_with_its_reason(broken):
    name, problem = choose_optimiser("auto", GPU)
    assert name == "adamw_torch"
    assert problem.startswith(f"bitsandbytes cannot be imported ({type(broken).__name__}")
    assert "\n" not in problem and problem.count("(") == problem.count(")")
    for asked in ("adamw_bnb_8bit", "paged_adamw_32bit", "lion_8bit"):
        with pytest.raises(UsageError, match=f"--optim {asked}: bitsandbytes cannot be imported"):
            choose_optimiser(asked, GPU)
    assert choose_optimiser("adamw_torch", GPU) == ("adamw_torch", None)
    assert choose_optimiser("auto", CPU) == ("adamw_torch", None)  # nothing was given up there


def test_a_bitsandbytes_that_works_is_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    assert bitsandbytes_problem() is None
    assert choose_optimiser("auto", GPU) == ("adamw_bnb_8bit", None)
    assert choose_optimiser("lion_8bit", GPU) == ("lion_8bit", None)


def test_a_last_step_that_cannot_be_saved_is_said(tmp_path):
    said = []

    def full():
        raise OSError(28, "No space left on device")

    trainer = SimpleNamespace(
        save_last_step=full,
        folder=tmp_path,
        state=SimpleNamespace(global_step=7),
        events=SimpleNamespace(warning=said.append),
    )
    recipe._save_after(ValueError("a frame is gone"), trainer)
    (text,) = said
    assert "step 7 could not be saved after ValueError" in text and "No space left" in text
    assert text.endswith("the newest saved state is none")


def test_options_become_training_arguments():
    paths = ("model_name_or_path", "train_data_path", "frames_dir", "audio_dir", "eval_data_path")
    options_for = functools.partial(TrainOptions, **dict.fromkeys(paths, "x"))
    assert training_arguments(options_for(max_steps=0, device="cpu"), Path("out")).max_steps == -1
    options = options_for(warmup_ratio=0.25, save_total_limit=1, device="cpu", optim="auto", report_to="none")
    options.extra = {"lr_scheduler_type": "cosine", "weight_decay": "0.1", "dataloader_drop_last": "true"}
    arguments = training_arguments(options, Path("out"))
    assert arguments.get_warmup_steps(200) == 50
    assert (arguments.lr_scheduler_type, arguments.weight_decay, arguments.dataloader_drop_last) == (
        "cosine",
        0.1,
        True,
    )
    assert arguments.learning_rate == 2e-4 and arguments.gradient_accumulation_steps == 4
    assert arguments.optim == "adamw_torch" and not arguments.bf16 and arguments.report_to == []
