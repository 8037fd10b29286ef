"""What of a folder is sent: what a checkpoint or adapter is loaded from, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remote.upload.plan import folder_sources
from surgvqa.errors import UsageError


def checkpoint(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def sent(folder: Path, left_out: list[str] | None = None) -> set[str]:
    return {path for _, path in folder_sources(folder, left_out)}


def test_of_a_clone_only_the_checkpoint_is_sent_and_the_rest_is_named(tmp_path):
    wanted = {"config.json", "model.safetensors", "merges.txt", "chat_template.jinja", "tokenizer.model"}
    others = (".git/config", ".git/lfs/objects/ab/cd/abcd", ".cache/huggingface/download/x.incomplete",
              ".gitattributes", "checkpoint-50/optimizer.pt", "checkpoint-50/model.safetensors",
              "pytorch_model.bin", "optimizer.pt",
              "runs/events", "model.safetensors.tmp", "training_args.bin", "trainer_state.json")  # fmt: skip
    checkpoint(tmp_path / "c", *wanted, *others)
    left_out: list[str] = []
    assert sent(tmp_path / "c", left_out) == wanted
    said = " ".join(left_out)
    for name in {other.split("/")[0] for other in others}:
        assert name in said


def test_an_adapter_that_was_saved_as_bin_is_sent(tmp_path):
    assert sent(checkpoint(tmp_path, "adapter_model.bin", "adapter_config.json")) == {
        "adapter_model.bin",
        "adapter_config.json",
    }


@pytest.mark.parametrize("kind", ["dangling", "loop", "fifo", "lfs", "folder", "empty", "index"])
def test_a_shard_that_is_none_is_refused_by_name(tmp_path, kind):
    checkpoint(tmp_path, "config.json", "model-00001-of-00002.safetensors")
    shard = tmp_path / "model-00002-of-00002.safetensors"
    if kind == "dangling":
        shard.symlink_to("../blobs/gone")
    elif kind == "loop":
        shard.symlink_to(shard.name)
    elif kind == "fifo":
        os.mkfifo(shard)
    elif kind == "folder":
        shard.mkdir()
    elif kind == "empty":
        shard.touch()
    elif kind == "lfs":
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    else:
        weight_map = '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'
        (tmp_path / "model.safetensors.index.json").write_text(weight_map)
    with pytest.raises(UsageError, match="model-00002-of-00002"):
        folder_sources(tmp_path)


def test_links_to_whole_files_are_sent_as_files(tmp_path):
    blob = tmp_path / "blobs" / "abc"
    checkpoint(tmp_path, "blobs/abc")
    snapshot = checkpoint(tmp_path / "snapshot", "config.json")
    (snapshot / "model.safetensors").symlink_to(blob)
    assert sent(snapshot) == {"config.json", "model.safetensors"}
