"""Headers, index, names and config.json: what is read off a folder, and what is wrong with it."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from checkpoint_kit import SHARDS, write_file, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from surgvqa.checkpoint import headers
from surgvqa.checkpoint.audit import audit
from surgvqa.checkpoint.config_json import flat_config, quantisation, side_files, whisper_config
from surgvqa.checkpoint.folder import open_checkpoint, parse_size
from surgvqa.checkpoint.headers import TensorInfo, header_bytes, read_header
from surgvqa.checkpoint.names import INDEX_FILE, to_old_name
from surgvqa.errors import UsageError


def test_header_round_trip(tmp_path: Path) -> None:
    spec = {"a": ("BF16", (2, 3)), "b": ("F32", ()), "c": ("I64", (0, 4)), "d": ("U8", (5,))}
    content = write_file(tmp_path / "x.safetensors", spec)
    tensors, problems = read_header(tmp_path / "x.safetensors")
    assert problems == []
    assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == spec
    whole = (tmp_path / "x.safetensors").read_bytes()
    assert {n: whole[t.offset : t.offset + t.nbytes] for n, t in tensors.items()} == content


def raw_file(file: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(begin: int, end: int, dtype: str = "BF16", shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "size", "text"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "b: overlaps the data of a"),
        ({"a": entry(0, 4), "b": entry(6, 10)}, 10, "2 bytes that belong to no tensor before b"),
        ({"a": entry(0, 4)}, 3, "a: truncated: data ends at byte"),
        ({"a": entry(0, 4)}, 9, "5 bytes after the last tensor"),
        ({"a": entry(0, 4, shape=(3,))}, 4, "a: 4 bytes, but BF16 [3] needs 6"),
        ({"a": entry(0, 4, dtype="Q4")}, 4, "a: unknown dtype Q4"),
        ({"a": entry(0, 4, shape=(-2,))}, 4, "damaged header"),
        ({"a": {"dtype": "BF16"}}, 4, "damaged header"),
        (b"{not json", 4, "damaged header"),
        (b'{"a":' * 100_000, 4, "damaged header: nested too deeply"),
        ({"a": entry(0, 4, shape=(1,) * 9)}, 4, "a: a shape or offset that is negative, fractional or too large"),
        ({"a": entry(0, 4, shape=(10**300,))}, 4, "a: a shape or offset that is negative, fractional or too large"),
        ({"a": entry(0, 2, shape=(True,))}, 2, "a: a shape or offset that is negative, fractional or too large"),
        ({"a": {**entry(0, 4), "dtype": ["BF16"]}}, 4, "a: dtype is"),
        ({"a": {**entry(0, 4), "dtype": "Q" * 10_000}}, 4, "unknown dtype QQQQ"),
        ({"a" * 5000: entry(0, 4)}, 4, "not a valid tensor name"),
        ({"a\x1b]52;c;aGk=\x07": entry(0, 4)}, 4, "not a valid tensor name"),
        (b"[1]", 4, "damaged header: expected an object, found a list"),
    ],
)
def test_damage_is_named(tmp_path: Path, header: Any, size: int, text: str) -> None:
    _, problems = read_header(raw_file(tmp_path / "x.safetensors", header, b"\0" * size))
    assert any(text in p and "x.safetensors" in p for p in problems), problems
    assert all(len(p) < 1000 and p.isprintable() for p in problems)


def test_a_header_larger_than_any_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of thousands of tensors took 12 s, and numbers by the million gigabytes."""
    parsed = []
    monkeypatch.setattr("surgvqa.checkpoint.headers.load_json", parsed.append)
    many = {f"t{i}": entry(2 * i, 2 * i + 2, shape=(1,)) for i in range(headers.MAX_TENSORS + 1)}
    _, problems = read_header(raw_file(tmp_path / "many.safetensors", many, b""))
    assert problems == [f"{tmp_path / 'many.safetensors'}: 50001 tensors in its header, expected 50000 at most"]
    with open(tmp_path / "long.safetensors", "wb") as file:
        file.write((50_000_000).to_bytes(8, "little"))
        file.truncate(50_000_100)
    _, problems = read_header(tmp_path / "long.safetensors")
    assert "a header of 50000000 bytes, expected 32000000 at most" in problems[0] and not parsed


def test_shards_with_more_tensors_than_any_are_not_all_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "c", SHARDS)
    monkeypatch.setattr("surgvqa.checkpoint.folder.MAX_TENSORS", 9)
    with pytest.raises(UsageError, match="20 tensors in weight_map, expected 9 at most"):
        open_checkpoint(tmp_path / "c")
    (tmp_path / "c" / INDEX_FILE).unlink()
    checkpoint = open_checkpoint(tmp_path / "c")
    assert len(checkpoint.tensors) == 8 and any("more than 9 tensors" in text for text in checkpoint.problems)


def test_what_is_no_file_of_weights_is_named(tmp_path: Path) -> None:
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000000000\n")
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for ever
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone")
    for name, text in (
        ("pointer", "a git-LFS pointer, not the weights; fetch them with `git lfs pull`"),
        ("pipe", "not a regular file"),
        ("folder", "not a regular file"),
        ("link", "a broken link"),
    ):
        file = tmp_path / f"{name}.safetensors"
        assert read_header(file) == ({}, [f"{file}: {text}"])


@pytest.mark.parametrize("name", [INDEX_FILE, "config.json", "model-00002-of-00005.safetensors"])
@pytest.mark.parametrize("made", ["link", "folder", "pipe"])
def test_what_stands_in_place_of_a_file_is_named(tmp_path: Path, name: str, made: str) -> None:
    write_folder(tmp_path / "c", SHARDS)
    file = tmp_path / "c" / name
    file.unlink()
    {"link": lambda: file.symlink_to("gone"), "folder": file.mkdir, "pipe": lambda: os.mkfifo(file)}[made]()
    text = "a broken link" if made == "link" else "not a regular file"
    problems = open_checkpoint(tmp_path / "c").problems
    assert any(name in problem and text in problem for problem in problems), problems


def test_a_tokenizer_file_that_cannot_be_carried_over_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", SHARDS)
    (tmp_path / "c" / "vocab.json").symlink_to("gone")
    with pytest.raises(UsageError, match=r"vocab\.json: a broken link; repair it, or move it away"):
        side_files(open_checkpoint(tmp_path / "c"), {})


def test_what_lies_beside_a_good_index_is_said_and_no_fault(tmp_path: Path) -> None:
    """An older set of shards, what macOS leaves, a pipe."""
    write_folder(tmp_path / "c", SHARDS)
    write_file(tmp_path / "c" / "model-00001-of-00009.safetensors", {"s": ("BF16", (1,))})
    (tmp_path / "c" / "._model-00001-of-00005.safetensors").write_bytes(b"\0\5\x16\7" * 1000)
    os.mkfifo(tmp_path / "c" / "pipe.safetensors")
    checkpoint = open_checkpoint(tmp_path / "c").require_sound()
    (warning,) = checkpoint.warnings
    assert "model-00001-of-00009.safetensors: not named in" in warning
    write_file(tmp_path / "c" / "model.safetensors", {"s": ("BF16", (1,))})  # transformers would load this one
    with pytest.raises(UsageError, match=r"model\.safetensors: not named in .* beside it; move one of them away"):
        open_checkpoint(tmp_path / "c").require_sound()


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_in_the_other_unicode_form_is_found(tmp_path: Path, form: str) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    write_folder(tmp_path / unicodedata.normalize(form, "modèle") / unicodedata.normalize(form, "été"), SHARDS)
    asked = tmp_path / unicodedata.normalize(other, "modèle") / unicodedata.normalize(other, "été")
    assert not asked.exists()
    assert open_checkpoint(asked).problems == []
    with pytest.raises(UsageError, match="no such checkpoint folder"):
        open_checkpoint(asked.with_name("étée"))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "config.json: is empty"),
        ({"model_type": ["x"]}, "config.json: model_type is a list, expected text"),
        ({"vision_config": [1]}, "config.json: vision_config is a list, expected an object"),
        ({"text_config": "x"}, "config.json: text_config is text, expected an object"),
        ({"tie_word_embeddings": "no"}, "config.json: tie_word_embeddings is text, expected true or false"),
        ({"rope_parameters": 7}, "config.json: rope_parameters is a number, expected an object"),
        ({"quantization_config": "x"}, "config.json: quantization_config is text, expected an object"),
        ({"text_config": {"rope_parameters": "x"}}, "config.json: text_config.rope_parameters is text"),
    ],
    ids=str,
)
def test_a_config_json_that_is_none_is_named(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    write_folder(tmp_path / "c", [{"a": ("BF16", (2,))}])
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path / "c")
    assert len(checkpoint.problems) == 1 and text in checkpoint.problems[0]
    flat_config(checkpoint.config)  # what is left can be used
    assert audit(checkpoint)["ok"] is False


@pytest.mark.parametrize(
    "name", ["..", "", "a/b.safetensors", "x\0.safetensors", ".a.safetensors", "x" * 5000, 5, None]
)
def test_an_index_names_plain_files_only(tmp_path: Path, name: Any) -> None:
    write_folder(tmp_path / "c", SHARDS)
    (tmp_path / "c" / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UsageError, match=r"is not the plain name of a \.safetensors file") as caught:
        open_checkpoint(tmp_path / "c")
    assert len(str(caught.value)) < 500


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_problem_not_a_crash(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "random.safetensors"
    file.write_bytes(content)
    tensors, problems = read_header(file)
    assert problems or not tensors


def test_index_against_shards(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", SHARDS)
    assert open_checkpoint(tmp_path / "c").problems == []
    index = json.loads((tmp_path / "c" / INDEX_FILE).read_text())
    names = list(index["weight_map"])
    index["weight_map"][names[0]] = index["weight_map"][names[-1]]
    index["weight_map"]["ghost"] = index["weight_map"][names[-1]]
    del index["weight_map"][names[5]]
    (tmp_path / "c" / INDEX_FILE).write_text(json.dumps(index))
    write_file(tmp_path / "c" / "stray.safetensors", {"s": ("BF16", (1,))})
    problems = "\n".join(open_checkpoint(tmp_path / "c").problems)
    assert f"{names[0]}: {INDEX_FILE} says {index['weight_map'][names[0]]}" in problems
    assert f"ghost: in {INDEX_FILE}, but not in the file" in problems
    assert f"{names[5]}: not in {INDEX_FILE}" in problems
    assert len(problems.splitlines()) == 3, problems
    (tmp_path / "c" / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(UsageError, match="and 2 more"):
        open_checkpoint(tmp_path / "c").require_sound()


def test_duplicates_and_folders_without_index(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", [{"a": ("BF16", (2,))}])
    write_file(tmp_path / "c" / "other.safetensors", {"a": ("BF16", (2,))})
    assert open_checkpoint(tmp_path / "c").problems == []  # model.safetensors is the checkpoint
    (tmp_path / "c" / "model.safetensors").rename(tmp_path / "c" / "part.safetensors")
    problems = "\n".join(open_checkpoint(tmp_path / "c").problems)
    assert "2 shards and no" in problems and "also in other.safetensors" in problems
    for content, text in (("adapter_config.json", "this is an adapter"), ("x.bin", r"only \.bin weights")):
        (tmp_path / content).mkdir()
        (tmp_path / content / content).write_text("{}")
        with pytest.raises(UsageError, match=text):
            open_checkpoint(tmp_path / content)
    with pytest.raises(UsageError, match="no such checkpoint folder"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "c" / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../../etc/x"}}))
    with pytest.raises(UsageError, match="is not the plain name of a"):
        open_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.visual.blocks.0.norm1.bias", "visual.blocks.0.norm1.bias"),
        ("model.audio_encoder.conv1.weight", "audio_encoder.conv1.weight"),
        ("model.audio_projector", "audio_projector"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_old_names(new: str, old: str) -> None:
    assert to_old_name(new) == old == to_old_name(old)


def test_sizes_from_text() -> None:
    assert [parse_size(t) for t in ("5GB", "800mb", "2GiB", "1000", "1.5 KB")] == [
        5 * 10**9, 800 * 10**6, 2 * 2**30, 1000, 1500,
    ]  # fmt: skip
    for text in ("", "GB", "-1GB", "5 apples", "0", "1.2.3GB"):
        with pytest.raises(UsageError, match="expected a size"):
            parse_size(text)


def test_whisper_sizes_are_read_off_the_shapes() -> None:
    def info(name: str, *shape: int) -> TensorInfo:
        return TensorInfo(name, "BF16", shape, Path("x"), 0, 0)

    shapes = {
        "conv1.weight": (1280, 128, 3),
        "embed_positions.weight": (1500, 1280),
        "layers.0.fc1.weight": (5120, 1280),
    }
    tensors = {f"audio_encoder.{n}": info(n, *s) for n, s in shapes.items()}
    tensors |= {f"audio_encoder.layers.{i}.fc2.bias": info("b", 1280) for i in range(32)}
    assert whisper_config(tensors) == {
        "model_type": "whisper", "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120, "num_mel_bins": 128, "max_source_positions": 1500,
    }  # fmt: skip
    assert whisper_config({}) is None


def test_nested_config_becomes_flat() -> None:
    rope = {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [16, 24, 24]}
    nested = {
        "model_type": "qwen2_vl", "dtype": "bfloat16", "vision_config": {"depth": 2},
        "text_config": {"model_type": "qwen2_vl_text", "hidden_size": 8, "rope_parameters": rope},
    }  # fmt: skip
    assert flat_config(nested) == {
        "model_type": "qwen2_vl", "torch_dtype": "bfloat16", "vision_config": {"depth": 2}, "hidden_size": 8,
        "rope_theta": 1e6, "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    assert flat_config(flat_config(nested)) == flat_config(nested)


def test_quantised_checkpoints_are_recognised(tmp_path: Path) -> None:
    marks = {"a.weight.absmax": "4-bit", "a.SCB": "quantised", "a.qweight": "quantised", "a.bias": None}
    for number, (name, word) in enumerate(marks.items()):
        write_folder(tmp_path / str(number), [{name: ("F32", (2,))}])
        said = quantisation(open_checkpoint(tmp_path / str(number)))
        assert (word is None and said is None) or (word in said and (word == "quantised" or name in said))
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    write_folder(tmp_path / "c", [{"a": ("U8", (2,))}], config)
    assert "4-bit" in quantisation(open_checkpoint(tmp_path / "c"))


def test_header_bytes_are_aligned() -> None:
    for length in range(20):
        head = header_bytes([("n" * length, "BF16", (1,), 2)])
        assert len(head) % 8 == 0 and int.from_bytes(head[:8], "little") == len(head) - 8
