"""What a training's answers to held-out samples add to the picture."""

from tui.follow.run_model import RunModel


def test_a_type_that_collapses_is_marked_once():
    model = RunModel({"command": "train"})
    for step, collapsed in ((10, ["dye"]), (20, ["dye", "tool"]), (30, ["tool"]), (40, None)):
        model.feed([{"kind": "answers", "t": 1.0, "step": step, "collapsed_types": collapsed}])
    assert [(mark.x, mark.text) for mark in model.marks] == [(20, "collapsed")]
    assert model.answers["step"] == 40 and model.answers["collapsed_types"] == [] and not model.damage
