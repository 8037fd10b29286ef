"""Trainer's private names exist with the signature we rely on and are called where we need it: a new transformers is to
fail here, loudly, and not silently in training."""

import inspect
import re

import pytest

transformers = pytest.importorskip("transformers")
from transformers import Trainer  # noqa: E402
from transformers.trainer_callback import PrinterCallback  # noqa: E402

from surgvqa.training import trainer_hooks  # noqa: E402
from surgvqa.training.trainer import EventTrainer  # noqa: E402

pytestmark = pytest.mark.model

SIGNATURES = {
    "floating_point_ops": ["self", "inputs"],
    "_move_model_to_device": ["self", "model", "device"],
    "_prepare_inputs": ["self", "inputs"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_get_learning_rate": ["self"],
    "_determine_best_metric": ["self", "metrics", "trial"],
    "_save": ["self", "output_dir", "state_dict"],
    "_get_output_dir": ["self", "trial"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_best_model": ["self"],
    "_load_rng_state": ["self", "checkpoint"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_trainer_has_it_with_this_signature(name):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == SIGNATURES[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_trainer_calls_it(name):
    assert re.search(rf"\bself\.{name}\(", inspect.getsource(Trainer)), f"nothing in Trainer calls {name} any more"


def test_every_private_override_is_listed_and_stands_in_one_file():
    def overrides(ours):
        functions = {name for name, value in vars(ours).items() if inspect.isfunction(value)}
        return {name for name in functions if hasattr(Trainer, name) and not name.startswith("__")}

    hooked = trainer_hooks.HookedTrainer
    assert overrides(hooked) == SIGNATURES.keys() - {"_get_learning_rate"}
    for above in EventTrainer.__mro__[: EventTrainer.__mro__.index(hooked)]:
        assert not any(name.startswith("_") for name in overrides(above)), above


def test_the_printer_and_the_best_state_are_where_we_look():
    assert "PrinterCallback" in inspect.getsource(Trainer.__init__) and inspect.isclass(PrinterCallback)
    parameters = inspect.signature(trainer_hooks.rotate_checkpoints).parameters
    assert {"output_dir", "save_total_limit", "best_model_checkpoint"} <= parameters.keys()
    assert "model_accepts_loss_kwargs" in inspect.getsource(Trainer)
