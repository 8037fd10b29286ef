"""The vision tower with one attention for all frames against upstream's, a kernel a frame."""

import pytest

torch = pytest.importorskip("torch")
from tiny_model import built  # noqa: E402
from transformers.models.qwen2_vl import modeling_qwen2_vl  # noqa: E402

from surgvqa.model import torch_internals, vision  # noqa: E402
from surgvqa.model.transformers_internals import attention_of  # noqa: E402

pytestmark = pytest.mark.model

SIZES = {"vision_config": {"model_type": "qwen2_vl", "depth": 3, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}}


@pytest.fixture(scope="module")
def model():
    model = built(**SIZES)
    for parameter in model.model.visual.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    "grid", [[[1, 4, 6]] * 3, [[1, 4, 6], [1, 8, 2], [1, 2, 4]], [[2, 4, 4], [1, 4, 4]], [[1, 6, 4]]]
)
def test_frames_give_what_upstream_makes_of_them(model, grid):
    grid = torch.tensor(grid)
    patches = torch.randn(int(grid.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(1))
    visual = model.model.visual
    visual.config._attn_implementation = "sdpa"
    with torch.no_grad():
        expected = visual(patches, grid_thw=grid).pooler_output
        found = model.encode_images(patches, grid)
        assert attention_of(visual.config) == vision.FRAME_ATTENTION
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        mixed = patches.clone()
        mixed[-1] += 1  # a patch of the last frame is seen in that frame alone
        changed = (model.encode_images(mixed, grid) - found).abs().amax(1) > 1e-6
    last = int(grid[-1].prod()) // int(grid[-1, 0]) // 4
    assert changed[-last:].any() and not changed[:-last].any()


def test_another_attention_that_was_asked_for_stays(model):
    model.model.visual.config._attn_implementation = "eager"
    grid = torch.tensor([[1, 4, 6]])
    patches = torch.randn(24, 1176, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        eager = model.encode_images(patches, grid)
        assert attention_of(model.model.visual.config) == "eager"
        model.model.visual.config._attn_implementation = "sdpa"
        assert torch.allclose(model.encode_images(patches, grid), eager, rtol=1e-4, atol=1e-5)


def test_compiled_elementwise_parts_give_the_same_for_any_number_of_frames(model):
    visual, compiled = model.model.visual, []
    visual.config._attn_implementation = "sdpa"
    rotary = modeling_qwen2_vl.apply_rotary_pos_emb_vision
    for frames in (1, 3):
        grid = torch.tensor([[1, 4, 6]] * frames)
        patches = torch.randn(24 * frames, 1176, generator=torch.Generator().manual_seed(frames))
        with torch.no_grad():
            expected = model.encode_images(patches, grid)
            graphs = torch_internals.compilations()["graphs"]
            with vision.fused_elementwise(visual):
                assert modeling_qwen2_vl.apply_rotary_pos_emb_vision is not rotary
                assert torch.allclose(model.encode_images(patches, grid), expected, rtol=1e-5, atol=1e-6)
            compiled.append(torch_internals.compilations()["graphs"] - graphs)
        assert modeling_qwen2_vl.apply_rotary_pos_emb_vision is rotary
        assert not any("forward" in vars(block.mlp.act) for block in visual.blocks)
    assert compiled[0] == 2, "two functions, each compiled once for all blocks"
    assert torch_internals.compilations()["compile_failures"] == 0
