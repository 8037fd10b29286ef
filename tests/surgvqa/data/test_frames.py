"""Frames: which are taken, how large, and what broken files are told."""

import numpy as np
import pytest

from surgvqa.errors import UsageError

Image = pytest.importorskip("PIL.Image")
soundfile = pytest.importorskip("soundfile")
from surgvqa.data.frames import largest_frame, load_frame, select_frames  # noqa: E402


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Coarse noise: compresses well, and a shifted or blank image would not pass for it."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("count", "chosen"), [(8, [0, 1, 2, 3, 4, 5, 6, 7]), (6, [0, 1, 2, 4, 5, 6]), (3, [0, 2, 5]), (20, list(range(8)))]
)
def test_frames_are_chosen_evenly(count, chosen):
    assert select_frames(range(8), count) == chosen


def test_a_frame_only_shrinks(tmp_path):
    noise(1080, 1240).save(tmp_path / "large.jpg", quality=90)
    noise(200, 300).save(tmp_path / "small.png")
    assert load_frame(tmp_path / "large.jpg", 512).size == (512, 446)
    small = load_frame(tmp_path / "small.png", 512)
    assert small.size == (300, 200) and np.array_equal(small, noise(200, 300))


def test_a_frame_is_the_whole_image_shrunk(tmp_path):
    noise(1080, 1240).save(tmp_path / "large.jpg", quality=90)
    whole = Image.open(tmp_path / "large.jpg").convert("RGB")
    assert np.array_equal(load_frame(tmp_path / "large.jpg", 512), whole.resize((512, 446), Image.Resampling.BICUBIC))


def test_other_colour_modes_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK"):
        file = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
        noise(60, 80).convert(mode).save(file)
        assert load_frame(file, 512).mode == "RGB"


def test_a_frame_of_16_bits_is_named_and_never_white(tmp_path):
    file = tmp_path / "deep.png"
    Image.fromarray(np.full((32, 32), 1000, dtype=np.uint16)).save(file)
    with pytest.raises(UsageError, match=r"deep.png .*8 bits"):
        load_frame(file, 512)


def test_a_broken_frame_is_named_and_never_black(tmp_path):
    noise(400, 400).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    for name, broken in [("half.jpg", content[: len(content) // 2]), ("empty.jpg", b""), ("text.jpg", b"hello" * 100)]:
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(
            UsageError, match=rf"frame .*/{name} cannot be decoded \(.*\), expected a complete image file"
        ):
            load_frame(tmp_path / name, 512)
    with pytest.raises(UsageError, match=r"frame .*/none.jpg is missing"):
        load_frame(tmp_path / "none.jpg", 512)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_frame_is_turned_upright_as_its_exif_says(tmp_path, orientation, suffix):
    upright = noise(200, 300)
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # the turn that a viewer undoes
    image = upright if stored is None else upright.transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"frame.{suffix}"
    image.save(file, exif=exif, **({"quality": 95} if suffix == "jpg" else {}))
    shown = load_frame(file, 512)
    assert shown.size == upright.size == largest_frame([[str(file)]])
    assert np.abs(np.asarray(shown, dtype=int) - np.asarray(upright, dtype=int)).mean() < 8


@pytest.mark.parametrize("size", [(4, 1000), (1000, 4), (1, 201), (1830, 10)])
def test_a_frame_too_long_and_thin_for_the_model_is_named(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "thin.png")
    told = rf"thin\.png is {size[0]}×{size[1]} pixels, expected no side over 100 times the other"
    with pytest.raises(UsageError, match=told):
        load_frame(tmp_path / "thin.png", 512)


def test_the_largest_frame_of_a_broken_file_is_named(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(UsageError, match=r"frame .*/text\.jpg cannot be decoded"):
        largest_frame([[str(tmp_path / "text.jpg")]])
