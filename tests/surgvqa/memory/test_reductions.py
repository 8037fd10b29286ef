"""Fitting a training to the budget, and the order in which a run steps down: without a model."""

import pytest

from presets import step_down_presets
from surgvqa.config.options import TrainOptions
from surgvqa.memory import fit, reductions
from surgvqa.model.sizes import Sizes

NEEDED = ("model_name_or_path", "train_data_path", "frames_dir", "audio_dir")


def options_for(**changes) -> TrainOptions:
    return TrainOptions(**{**dict.fromkeys(NEEDED, "x"), **changes})


@pytest.fixture
def forecast(monkeypatch):
    """Of the real model on REAL-Colon-VQA frames, as training/recipe.py runs it on a GPU."""
    monkeypatch.setattr(reductions, "checkpoint_sizes", lambda folder: (Sizes(), None))
    return reductions.Forecast(options_for(), (1240, 1080))


def test_fit_takes_the_fewest_recomputing_layers_within_the_budget(forecast):
    found = reductions.fit(options_for(), 28, forecast, 28.5)
    assert found.prediction.predicted_peak_gb <= 28.5 * (1 - fit.MARGIN) and found.warning is None
    assert found.prediction.configuration.checkpointed_layers == found.recomputing
    if found.recomputing:
        fewer = forecast.of(options_for(checkpointed_layers=found.recomputing - 1))
        assert fewer.predicted_peak_gb > 28.5 * (1 - fit.MARGIN)
    tight = reductions.fit(options_for(), 28, forecast, found.prediction.predicted_peak_gb - 2)
    assert found.recomputing < tight.recomputing < 28
    assert f"{tight.recomputing} of 28 layers" in tight.text and "the fewest that fit" in tight.text


def test_fit_says_what_compiled_layers_keep(forecast):
    plan = reductions.fit(options_for(), 28, forecast, 28.5)
    assert plan.keep == "products" and plan.recomputing <= 3 and plan.text.endswith("keep only matrix products")
    more = reductions.fit(options_for(), 28, forecast, 35)
    assert (more.keep, more.recomputing) == ("products", 0) and more.text.endswith("keep only matrix products")
    roomy = reductions.fit(options_for(), 28, forecast, 60)
    assert (roomy.keep, roomy.recomputing) == ("all", 0) and roomy.text.endswith("keep all activations")
    few = reductions.fit(options_for(checkpointed_layers=20), 28, forecast, 28.5)  # 20 of 28 leave room for the rest
    assert few.keep == "all" and few.prediction.configuration.keep == "all"
    assert reductions.fit(options_for(checkpointed_layers=4), 28, forecast, 28.5).keep == "products"
    assert reductions.fit(options_for(keep_activations="all"), 28, forecast, 28.5).keep == "all"
    assert reductions.fit(options_for(), 28, None, 28.5).keep == "products"  # a CPU


def test_fit_does_what_was_asked_for(forecast):
    assert reductions.fit(options_for(checkpointed_layers=7), 28, forecast, 28.5).recomputing == 7
    off = reductions.fit(options_for(gradient_checkpointing=False), 28, forecast, 28.5)
    assert off.recomputing == 0 and off.prediction.configuration.checkpointed_layers == 0
    assert reductions.fit(options_for(), 28, None, 28.5).recomputing == 28  # a CPU


def test_fit_warns_of_what_does_not_and_names_what_does(forecast):
    need = {
        p.name: forecast.of(reductions.changed(options_for(), **p.settings)).predicted_peak_gb
        for p in step_down_presets()
    }
    assert need["baseline-8f-512px"] > need["oom-6f-512px"] > need["oom-8f-384px"] > need["oom-6f-384px"]
    between = (need["oom-6f-512px"] + need["spoken-8f-512px"]) / 2
    found = reductions.fit(options_for(), 28, forecast, between, step_down_presets())
    assert found.recomputing == 28 and "--preset spoken-8f-512px would take" in found.warning
    assert "no preset fits either" in reductions.fit(options_for(), 28, forecast, 5, step_down_presets()).warning
    asked = reductions.fit(
        options_for(checkpointed_layers=0), 28, forecast, need["baseline-8f-512px"] + 1, step_down_presets()
    )
    assert asked.recomputing == 0 and "--checkpointed_layers" in asked.warning


def descent(options, recomputing, forecast, limit_gb) -> list:
    """The names of all reductions, one after the other; None for recomputing."""
    path = []
    while found := reductions.next_reduction(options, recomputing, 28, step_down_presets(), forecast, limit_gb):
        path.append(found.preset)
        options = reductions.changed(options, **found.settings)
        recomputing = options.checkpointed_layers
    return path


def test_recomputing_comes_first_and_presets_that_cannot_fit_are_skipped(forecast):
    everything = [None, "spoken-8f-512px", "oom-6f-512px", "oom-8f-384px", "oom-6f-384px"]
    assert descent(options_for(), 12, forecast, 28.5) == everything
    assert descent(options_for(), 12, None, 28.5) == everything
    assert descent(options_for(), 28, None, 28.5) == everything[1:]
    assert descent(options_for(num_frames=6, image_size=448), 28, None, 28.5) == everything[3:]
    assert descent(options_for(audio_span="spoken"), 28, None, 28.5) == everything[2:]
    eight = forecast.of(options_for(audio_span="spoken")).predicted_peak_gb
    assert descent(options_for(), 28, forecast, eight - 0.01) == everything[2:]
    assert descent(options_for(), 28, forecast, 5) == []
    assert descent(options_for(), 12, forecast, eight + 0.01) == everything[1:]  # recomputing would not suffice


def test_what_a_preset_would_have_given_up_in_vain_stays_given_up(forecast):
    eight = forecast.of(options_for(audio_span="spoken")).predicted_peak_gb
    found = reductions.next_reduction(options_for(), 28, 28, step_down_presets(), forecast, eight - 0.01)
    assert found.preset == "oom-6f-512px" and found.settings["audio_span"] == "spoken"
    assert found.predicted_gb == forecast.of(options_for(num_frames=6, audio_span="spoken")).predicted_peak_gb


def test_under_a_cap_what_is_reserved_must_fit(forecast):
    eight = forecast.of(options_for(audio_span="spoken"))
    between = (eight.predicted_peak_gb + eight.predicted_reserved_gb) / 2
    assert descent(options_for(), 28, forecast, between)[0] == "spoken-8f-512px"
    assert descent(options_for(enforce_budget=True), 28, forecast, between)[0] == "oom-6f-512px"
    plans = [reductions.fit(options_for(enforce_budget=capped), 28, forecast, 28.5) for capped in (False, True)]
    assert plans[0].prediction.predicted_reserved_gb > plans[1].prediction.predicted_reserved_gb
    assert plans[1].prediction.predicted_reserved_gb <= 28.5 * (1 - fit.MARGIN) and plans[1].warning is None


def test_in_an_evaluation_recomputing_reduces_nothing():
    found = reductions.next_reduction(options_for(), 0, 28, step_down_presets(), None, 28.5, evaluating=True)
    assert found.preset == "spoken-8f-512px"
    assert found.settings == {"num_frames": 8, "image_size": 512, "audio_span": "spoken"}
