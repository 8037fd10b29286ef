"""The end of a publication: killed at any moment, nothing mixed counts as whole and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from sender import wire
from shards import checkpoint, tree

from remote.agent import staging, standing
from remote.upload.hashes import Hashes, Item
from remote.upload.plan import folder_sources


class Killed(BaseException):
    """In place of SIGKILL."""


def arrive(workspace: str, item: Item) -> bool:
    """As if all chunks of the item had arrived; whether it was there already."""
    if staging.begin(None, workspace, wire(item))["complete"]:
        return True
    for entry in item.entries:
        staged = Path(staging.staged(standing.staging_of(workspace, item.digest), entry.path))
        staged.parent.mkdir(parents=True, exist_ok=True)
        staged.unlink(missing_ok=True)
        staged.write_bytes(Path(entry.source).read_bytes())
    return False


@pytest.mark.parametrize("removed", range(6))
def test_what_a_checkpoint_replaced_is_removed_although_we_were_killed(tmp_path, monkeypatch, removed):
    """After the record is written and some of the replaced files are gone. The next upload finds it published."""
    workspace, source = str(tmp_path / "host"), checkpoint(tmp_path / "merged", {"a.safetensors": 1000})
    os.mkdir(workspace)
    for version in range(2):
        (source / "a.safetensors").write_bytes(bytes([version]) * 1000)
        item = Item("merged", "folder", Hashes(tmp_path / "cache.json").entries(folder_sources(source)))
        arrive(workspace, item)
        if not version:
            staging.publish(None, workspace, wire(item))
    real, left = os.unlink, removed

    def unlink(path: str) -> None:
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        real(path)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(os, "unlink", unlink)
        staging.publish(None, workspace, wire(item))
    stagings = Path(workspace, ".surgvqa", "staging")
    asked = standing.known(None, workspace, [wire(item)])["items"][0]
    assert asked["state"] == "complete" and tree(Path(workspace, "merged")) == tree(source)
    if os.listdir(stagings):
        assert not asked.get("published"), "else nobody would clean up"
        assert arrive(workspace, item)
    assert not os.listdir(stagings)
    assert standing.known(None, workspace, [wire(item)])["items"][0]["published"]
    assert not standing.read_record(workspace, "merged")["old_files"]
