"""The small worlds of the training tests, and memory that runs out."""

import functools

import pytest
import small
import watched


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return small.build(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def noisy_world(tmp_path_factory):
    """With noisy frames of 168×112, so that a smaller size shows other pixels."""
    import numpy as np
    from PIL import Image

    built = small.build(tmp_path_factory.mktemp("noisy"))
    noise = np.random.default_rng(0)
    for file in sorted((built.root / "frames").rglob("*.jpg")):
        Image.fromarray(noise.integers(0, 255, (112, 168, 3), dtype=np.uint8)).save(file)
    return built


@pytest.fixture
def out_of_memory(monkeypatch):
    return functools.partial(watched.out_of_memory, monkeypatch)
