"""Checkpoints that the writer copies."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_kit import PAGES, SHARDS, write_folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_folder(tmp_path / "base", SHARDS)
    return tmp_path / "base"


@pytest.fixture(params=[(SHARDS, 2000), (PAGES, 30_000)], ids=["bytes", "pages"])
def sized(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, int]:
    """A base and the shard size for it; one with shards below a page, one with pages and several blocks a tensor."""
    shards, most = request.param
    write_folder(tmp_path / "base", shards)
    monkeypatch.setattr("surgvqa.checkpoint.shards.BLOCK_BYTES", 5000)
    return tmp_path / "base", most
