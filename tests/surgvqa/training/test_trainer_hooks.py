"""Trainer's private names exist with the signature we rely on and are called where we need it: a new transformers is to
fail here, loudly, and not silently in training."""

import inspect
import re
from types import SimpleNamespace

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
    "_get_num_items_in_batch": ["self", "batch_samples", "device"],
    "_clip_grad_norm": ["self", "model"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_get_learning_rate": ["self"],
    "_evaluate": ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"],
    "_determine_best_metric": ["self", "metrics", "trial"],
    "_save": ["self", "output_dir", "state_dict"],
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
    assert overrides(hooked) == SIGNATURES.keys() - {"_get_learning_rate", "_evaluate"}
    for above in EventTrainer.__mro__[: EventTrainer.__mro__.index(hooked)]:
        assert not any(name.startswith("_") for name in overrides(above)), above


def test_the_printer_and_the_best_state_are_where_we_look():
    assert "PrinterCallback" in inspect.getsource(Trainer.__init__) and inspect.isclass(PrinterCallback)
    parameters = inspect.signature(trainer_hooks.rotate_checkpoints).parameters
    assert {"output_dir", "save_total_limit", "best_model_checkpoint"} <= parameters.keys()
    assert "model_accepts_loss_kwargs" in inspect.getsource(Trainer)


def test_a_schedule_says_the_learning_rates_that_it_was_told():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer_hooks.set_last_learning_rates(scheduler, [0.25])
    assert scheduler.get_last_lr() == [0.25]


def test_the_number_of_gpus_that_trainer_divides_a_batch_over_is_where_we_set_it():
    arguments = SimpleNamespace(n_gpu=4)
    trainer_hooks.use_one_gpu(arguments)
    assert arguments._n_gpu == 1 and "return self._n_gpu" in inspect.getsource(
        transformers.TrainingArguments.n_gpu.fget
    )
