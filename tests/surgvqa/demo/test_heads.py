"""The demo's shaped heads do look where they are said to look, and what is seen is called by its look."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from surgvqa.data.processors import load_processors  # noqa: E402
from surgvqa.data.prompt import mrope_positions, prompt_ids  # noqa: E402
from surgvqa.demo import workspace  # noqa: E402
from surgvqa.demo.heads import marks  # noqa: E402
from surgvqa.demo.stage1 import directions, looks  # noqa: E402
from surgvqa.demo.tokenizer import write_tokenizer  # noqa: E402
from surgvqa.demo.weights import DemoSizes, write_stage1  # noqa: E402
from surgvqa.model.loading import load_model  # noqa: E402

pytestmark = pytest.mark.model
FRAMES, SIDE = 8, 4


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    """The demo's fresh model, the ids of a prompt about eight frames, their positions, and embeddings whose sound and
    frames are noise."""
    folder = tmp_path_factory.mktemp("stage1")
    write_stage1(folder, DemoSizes(), write_tokenizer(folder, workspace.training_text()), 0)
    processors = load_processors(folder)
    model = load_model(folder, dtype=torch.float32, device="cpu", attn_implementation="eager")
    grids = [(1, 2 * SIDE, 2 * SIDE)] * FRAMES
    ids = np.array(prompt_ids(processors, grids, 160, "", "audio_only"))
    generator = torch.Generator().manual_seed(0)
    wide = DemoSizes().hidden_size
    embedded = model.get_input_embeddings()(torch.from_numpy(ids))
    seen, heard = ids == processors.image_token_id, ids == processors.audio_token_id
    for mark, here in enumerate((heard, seen)):
        noise = torch.randn(int(here.sum()), wide, generator=generator)
        embedded[torch.from_numpy(here)] = 0.5 * noise + 0.5 * torch.from_numpy(marks(wide)[mark]).float()
    positions = torch.from_numpy(mrope_positions(processors, ids, grids))[:, None]
    return model.model.language_model, processors, ids, positions, embedded


@pytest.fixture(scope="module")
def attention(prompt):
    """Attention [heads, queries, keys] of both layers, where each frame's tokens begin, and where it ends."""
    model, processors, ids, positions, embedded = prompt
    with torch.no_grad():
        out = model(inputs_embeds=embedded[None], position_ids=positions, output_attentions=True, use_cache=False)
    ends = np.flatnonzero(ids == processors.vision_end_token_id)
    return [layer[0].numpy() for layer in out.attentions], ends


SIDES = {4: np.s_[:, :2], 5: np.s_[:, 2:], 6: np.s_[:2], 7: np.s_[2:]}
"""Head -> left, right, upper and lower half."""


@pytest.mark.parametrize(("head", "side"), SIDES.items())
def test_what_ends_a_frame_looks_at_its_sides(attention, head, side):
    (first, _), ends = attention
    for end in ends:
        own = first[head, end, end - SIDE * SIDE : end].reshape(SIDE, SIDE)
        assert own.sum() > 0.8 and own[side].sum() > 0.75 * own.sum()


@pytest.mark.parametrize("head", [4, 6])
def test_the_answer_compares_late_frames_with_early_ones(attention, head):
    (_, second), ends = attention
    late, early = second[head, -1, ends], second[head + 1, -1, ends]
    assert late[FRAMES // 2 :].sum() > 0.7 and early[: FRAMES // 2].sum() > 0.7


@pytest.mark.parametrize(("first", "across"), [(4, 1), (6, 0)], ids=["left to right", "top to bottom"])
def test_the_answer_sees_which_way_something_moves(prompt, first, across):
    """A thing in one column (row) after another, over noise that stays: backwards, what the heads say is the opposite;
    standing still, next to nothing."""
    model, processors, ids, positions, embedded = prompt
    here = torch.from_numpy(ids == processors.image_token_id)
    still = embedded[here].reshape(FRAMES, SIDE, SIDE, -1)[:1].repeat(FRAMES, 1, 1, 1)
    moving, thing = still.clone(), 2.2 * torch.from_numpy(directions(still.shape[-1], 1)[0]).float()
    for frame in range(FRAMES):
        moving[frame].transpose(0, across)[frame * SIDE // FRAMES] += thing

    def said(clip: torch.Tensor) -> torch.Tensor:
        heads, inputs = [], embedded.clone()
        inputs[here] = clip.reshape(-1, inputs.shape[-1])
        hook = model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, given: heads.append(given[0]))
        with torch.no_grad():
            model(inputs_embeds=inputs[None], position_ids=positions, use_cache=False)
        hook.remove()
        late, early = heads[0][0, -1].reshape(DemoSizes().num_attention_heads, -1)[first : first + 2]
        return late - early

    there, back, neither = said(moving), said(moving.flip(0)), said(still)
    assert torch.cosine_similarity(there, back, dim=0) < -0.9
    assert neither.norm() < 0.3 * min(there.norm(), back.norm())


def test_a_square_is_called_by_its_colour():
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4])
    colours = {"dark": (0, 0, 0), "white": (1, 1, 1), "grey": (0.5, 0.5, 0.5), "blue": (0.2, 0.2, 0.9),
               "green": (0.2, 0.7, 0.4), "red": (0.8, 0.2, 0.1), "pink": (0.9, 0.7, 0.6)}  # fmt: skip
    pixels = np.stack([np.array(c) for c in colours.values()])
    patches = np.repeat((pixels - mean) / std, 4, axis=0)[:, :, None] * np.ones(2 * 14 * 14)
    found = looks(patches.reshape(4 * len(colours), -1), mean.tolist(), std.tolist())
    assert np.allclose(found[:, : len(colours)], np.eye(len(colours)))
    assert np.allclose(found[:, 7], pixels.mean(1)) and np.allclose(found[:, 8:], 0)


def test_directions_leave_the_marks_alone():
    free, known = directions(64, 11), marks(64)
    assert np.allclose(free @ free.T, np.eye(11)) and np.allclose(free @ known.T, 0)
    assert np.allclose(known @ known.T, 64 * np.eye(3))
