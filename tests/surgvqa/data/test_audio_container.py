"""Sound files cut short are named, whole ones of every writer are not."""

import struct

import pytest

np = pytest.importorskip("numpy")
soundfile = pytest.importorskip("soundfile")

from surgvqa.data.audio import load_audio  # noqa: E402
from surgvqa.data.audio_container import missing_part  # noqa: E402
from surgvqa.errors import UsageError  # noqa: E402

KINDS = [("wav", {}), ("mp3", {}), ("ogg", {}), ("ogg", {"format": "OGG", "subtype": "OPUS"})]
KINDS += [("wav", {"format": name}) for name in ("RF64", "W64", "AIFF", "AU")]


def written(folder, extension: str, rate: int = 24_000, **how) -> bytes:
    file = folder / f"whole.{extension}"
    noise = np.random.default_rng(0).normal(size=2 * rate) / 10
    soundfile.write(file, noise, rate, **how)
    return file.read_bytes()


@pytest.mark.parametrize(("extension", "how"), KINDS)
@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
def test_a_whole_file_lacks_nothing_and_every_part_of_it_something(tmp_path, extension, how, rate):
    data = written(tmp_path, extension, rate, **how)
    assert missing_part(data) is None
    for share in (0.3, 0.5, 0.9, 0.99):
        assert missing_part(data[: int(share * len(data))]), share


@pytest.mark.model  # no model, but librosa, which takes seconds to import
@pytest.mark.parametrize("extension", ["wav", "mp3", "ogg", "flac"])
def test_a_part_of_a_question_is_never_heard(tmp_path, extension):
    data = written(tmp_path, extension)
    file = tmp_path / f"part.{extension}"
    file.write_bytes(data)
    assert len(load_audio(file)) == pytest.approx(32_000, abs=2500)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match=rf"part\.{extension} (is truncated|cannot be decoded)") as error:
        load_audio(file)
    assert "\n" not in str(error.value)


def test_the_length_promised_and_the_length_there_are_told(tmp_path):
    data = written(tmp_path, "wav")
    assert missing_part(data[: 44 + 48_000]) == "its header promises 2.0 s, 1.0 s are there"
    assert missing_part(data[:40]) == "its header promises sound that is not there"


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_a_wav_that_was_written_to_a_pipe_promises_nothing(tmp_path, size):
    data = written(tmp_path, "wav")
    place = data.index(b"data") + 4
    assert missing_part(data[:place] + struct.pack("<I", size) + data[place + 4 :]) is None


def test_an_mp3_without_xing_header_and_with_tags_is_whole(tmp_path):
    """As text-to-speech services stream it: plain frames one after another."""
    data = written(tmp_path, "mp3")
    first = data.index(b"\xff", 4)
    assert b"Xing" in data[:first] or b"Info" in data[:first]
    frames = data[data.index(data[:2], 4) :]
    assert missing_part(frames) is None
    tagged = b"ID3\x04\x00\x00\x00\x00\x00\x05hello" + frames + b"TAG" + bytes(125)
    assert missing_part(tagged) is None
    assert missing_part(frames[:-10]) == "its last frame is cut"


def test_an_mp4_box_that_ends_beyond_the_file():
    box = struct.pack(">I4s4s", 12, b"ftyp", b"M4A ")
    whole = box + struct.pack(">I4s", 16, b"mdat") + bytes(8)
    assert missing_part(whole) is None
    assert missing_part(whole[:-1]) == "its part 'mdat' promises 16 bytes, 15 are there"


@pytest.mark.parametrize(
    "data", [b"", b"RIFF", b"OggS", b"\xff\xfb", b"ID3", bytes(100), b"RIFF\0\0\0\0WAVE", b"\xff" * 99]
)
def test_any_bytes_get_an_answer(data):
    assert missing_part(data) is None or "\n" not in missing_part(data)


@pytest.mark.parametrize("rate", [1, 999, 900_000])
def test_a_sample_rate_of_no_recording_is_named(tmp_path, rate):
    """Of 1 Hz, two seconds would become nine hours, and 2 GB."""
    data = written(tmp_path, "wav")
    (tmp_path / "q.wav").write_bytes(data[:24] + struct.pack("<I", rate) + data[28:])
    with pytest.raises(UsageError, match=r"q\.wav says .* samples a second|q\.wav cannot be decoded"):
        load_audio(tmp_path / "q.wav")
