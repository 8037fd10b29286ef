"""Fixtures that several test files share."""

import tarfile
from pathlib import Path

import pytest
from places import SHARED


@pytest.fixture(scope="session")
def oracle(tmp_path_factory) -> Path:
    """The unpacked reference oracle: what the author's fork computed on a small model of the real architecture."""
    archive = SHARED / "oracle" / "fork-oracle.tar.xz"
    if not archive.is_file():
        pytest.skip(f"no reference oracle at {archive} (SURGVQA_SHARED names the folder that holds oracle/)")
    folder = tmp_path_factory.mktemp("oracle")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "fork-oracle"


@pytest.fixture
def root(tmp_path):
    """A workspace whose data does not exist yet."""
    (tmp_path / "surgvqa.toml").write_text(
        'preset = "baseline-8f-512px"\nimage_size = 512\ntrain_data_path = "train.jsonl"\nframes_dir = "frames"\n'
        'audio_dir = "audio"\n[merge]\noutput_path = "merged"\n'
    )
    return tmp_path
