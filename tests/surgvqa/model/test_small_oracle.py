"""Our model against what the author's fork computed, from figures that lie in this repository (tests/oracle/README.md).

Less than test_oracle.py holds, which needs the whole oracle beside the checkout; that has the vision tower, losses,
answers and gradients.
"""

import pytest

torch = pytest.importorskip("torch")
from oracle_kit import IDS, ROWS, SMALL, open_small  # noqa: E402

from surgvqa.model.loading import load_model  # noqa: E402

pytestmark = pytest.mark.model
LOGITS = 1e-4


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(inputs and what the fork computed, our model in float32)."""
    folder = tmp_path_factory.mktemp("small-oracle")
    kept = open_small(folder)
    return kept, load_model(folder, dtype=torch.float32, device="cpu", attn_implementation="sdpa")


def test_it_stays_small():
    assert SMALL.stat().st_size <= 3_000_000


@torch.no_grad()
def test_logits_after_the_spoken_question_equal_the_forks(small):
    kept, model = small
    end = int((kept["input_ids"][0] == model.config.vision_start_token_id).nonzero()[0])
    ids = kept["input_ids"][:, :end].long()
    sound = kept["input_features"].float()
    positions = kept["logits_positions"].long()
    assert len(positions) == 10 and positions[-1] == 1510, "the last token of the question among them"
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), input_features=sound).logits
    assert (logits[0, positions, :IDS] - kept["logits"]).abs().max() < LOGITS
    deaf = model(input_ids=ids, attention_mask=torch.ones_like(ids), input_features=torch.zeros_like(sound)).logits
    assert (deaf[0, positions[4:], :IDS] - kept["logits"][4:]).abs().max() > 0.1, "the sound decides them"


@torch.no_grad()
def test_positions_of_the_whole_sample_equal_the_forks(small):
    kept, model = small
    found, _ = model.model.get_rope_index(
        kept["input_ids"].long(),
        image_grid_thw=kept["image_grid_thw"].long(),
        mm_token_type_ids=(kept["input_ids"] == model.config.image_token_id).int(),
    )
    assert torch.equal(found, kept["position_ids"].long())


def test_merging_gives_the_forks_bits(small):
    """Rows of one module of layer 0, in float32 and rounded to bf16 once."""
    kept, model = small
    base = model.model.language_model.layers[0].self_attn.k_proj.weight[:ROWS]
    merged = base + 16 / 64 * (kept["lora_B"].float() @ kept["lora_A"].float())
    assert torch.equal(merged.bfloat16(), kept["merged"])
    assert not torch.equal(base.bfloat16(), kept["merged"])
