"""Sizes against headers, grids of patches against upstream."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgvqa.cli import main
from surgvqa.config.options import DataOptions, LoraOptions
from surgvqa.memory import predict
from surgvqa.memory.clip import MAX_PIXELS, MIN_PIXELS, clip_of, patch_grid, thumbnail_size
from surgvqa.model.sizes import Sizes, checkpoint_sizes

REAL = Sizes()


def test_the_real_model_has_8_93_billion_parameters():
    assert sum(map(sum, REAL.weights().values())) == 8_932_932_096  # counted on the GPU: 8.933 B
    assert sum(predict.adapter_tensors(REAL, LoraOptions())) == 166_068_224  # counted by PEFT: 166.1 M


@pytest.mark.parametrize(
    ("frames", "px", "grid", "tokens_a_frame"),
    [(8, 512, (32, 36), 288), (6, 384, (24, 28), 168), (8, 768, (48, 54), 648)],
)
def test_a_clip_of_the_real_dataset(frames, px, grid, tokens_a_frame):
    clip = clip_of(REAL, DataOptions(num_frames=frames, image_size=px))
    assert clip.grid == grid
    assert clip.image_tokens == frames * tokens_a_frame
    assert clip.audio_tokens == 1500


def test_a_written_question_takes_tokens():
    assert clip_of(REAL, DataOptions(input_mode="audio_text")).tokens > clip_of(REAL, DataOptions()).tokens


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 3000), st.integers(2, 3000), st.integers(28, 1500))
def test_thumbnail_size_is_pillows(width, height, longest):
    image = pytest.importorskip("PIL.Image").new("1", (width, height))
    image.thumbnail((longest, longest))
    assert image.size == thumbnail_size(width, height, longest)


@pytest.mark.model
@settings(deadline=None, max_examples=50)
@given(st.integers(28, 3000), st.integers(28, 3000))
def test_patch_grid_is_upstreams(width, height):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(width, height) / min(width, height) > 200:
        return
    rows, columns = smart_resize(height, width, 28, MIN_PIXELS, MAX_PIXELS)
    assert patch_grid(width, height, REAL) == (rows // 14, columns // 14)


def write_checkpoint(folder, sizes, without=""):
    """A checkpoint's headers and config with holes for the data."""
    h, e, d, kv = sizes.hidden_size, sizes.vision_embed_dim, sizes.d_model, sizes.kv_size
    shapes = {
        "model.embed_tokens.weight": (sizes.vocab_size, h),
        "lm_head.weight": (sizes.vocab_size, h),
        "model.norm.weight": (h,),
        "visual.patch_embed.proj.weight": (e, 3, 2, 14, 14),
        "visual.blocks.0.mlp.fc1.weight": (4 * e, e),
        "audio_encoder.conv1.weight": (d, sizes.num_mel_bins, 3),
        "audio_encoder.embed_positions.weight": (sizes.max_source_positions, d),
        "audio_encoder.layers.0.fc1.weight": (sizes.encoder_ffn_dim, d),
        "audio_projector.weight": (h, d),
    }
    for layer in range(sizes.num_hidden_layers):
        for name, (inputs, outputs) in sizes.projections().items():
            shapes[f"model.layers.{layer}.{name}.weight"] = (outputs, inputs)
        shapes[f"model.layers.{layer}.self_attn.k_proj.bias"] = (kv,)
    header, offset = {}, 0
    for name, shape in shapes.items():
        if without and name.startswith(without):
            continue
        count = 2
        for n in shape:
            count *= n
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)  # sparse
    config = {"num_attention_heads": sizes.num_attention_heads, "num_key_value_heads": sizes.num_key_value_heads}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SMALL = replace(REAL, num_hidden_layers=2, vision_depth=1, encoder_layers=1, vocab_size=2048, hidden_size=256,
                num_attention_heads=4, num_key_value_heads=2, intermediate_size=512, vision_embed_dim=160,
                max_source_positions=100)  # fmt: skip


def test_sizes_come_from_the_headers(tmp_path):
    sizes, weights = checkpoint_sizes(write_checkpoint(tmp_path / "c", SMALL))
    assert sizes == SMALL
    assert weights["head"] == weights["embeddings"] == [2048 * 256]
    assert sum(weights["projector"]) == 256 * SMALL.d_model


@pytest.mark.parametrize("without", ["audio_encoder", "visual", "model.embed_tokens"])
def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path, without, capsys):
    folder = write_checkpoint(tmp_path / "c", SMALL, without)
    assert main.main(["budget", "--model_name_or_path", str(folder)]) == 2
    assert str(folder) in capsys.readouterr().err
