"""The feature cache: whole entries or none, found by content, bounded, shared."""

import multiprocessing
import os
import pickle

import pytest

torch = pytest.importorskip("torch", reason="the feature cache needs the [train] extra")

from surgvqa.data.feature_store import FeatureStore  # noqa: E402
from surgvqa.errors import SurgvqaError  # noqa: E402

pytestmark = pytest.mark.model


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "cache", "encoders-1", {"merge": 2})


def filled(store, tmp_path, name="a.jpg", content=b"pixels", rows=4):
    path = tmp_path / name
    path.write_bytes(content)
    key = store.frame_key(str(path), 512)
    store.put(key, torch.arange(rows * 8, dtype=torch.bfloat16).view(rows, 8), grid="1 4 4")
    return key


def test_what_is_put_is_got_also_in_another_process(store, tmp_path):
    key = filled(store, tmp_path)
    for reader in (store, pickle.loads(pickle.dumps(store))):
        features, notes = reader.get(key)
        assert features.dtype == torch.bfloat16 and features[3, 7] == 31
        assert notes["grid"] == "1 4 4"


def test_the_key_is_the_content_the_encoders_and_the_settings(store, tmp_path):
    key = filled(store, tmp_path)
    assert filled(store, tmp_path, "same content, other name.jpg") == key
    assert filled(store, tmp_path, "b.jpg", b"other pixels") != key
    path = str(tmp_path / "a.jpg")
    others = [
        store.frame_key(path, 384),
        store.audio_key(path),
        FeatureStore(store.folder, "encoders-2", {"merge": 2}).frame_key(path, 512),
        FeatureStore(store.folder, "encoders-1", {"merge": 3}).frame_key(path, 512),
    ]
    assert len({key, *others}) == 5


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_damaged_entry_is_no_entry(store, tmp_path, damage):
    path = store.path(filled(store, tmp_path))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-1], "empty": b"", "text": b"not safetensors at all"}[damage])
    assert store.get(path.stem) is None
    assert not path.exists(), "it is encoded again, not met again"


def test_a_full_disk_leaves_no_entry(store, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SurgvqaError, match="No space left"):
        filled(store, tmp_path)
    assert not list(store.folder.glob("??/*.safetensors"))


def test_the_least_recently_used_make_room(store, tmp_path):
    keys = [filled(store, tmp_path, f"{n}.jpg", bytes([n]), rows=1000) for n in range(4)]
    for age, key in enumerate(reversed(keys)):
        os.utime(store.path(key), (1e9 - age, 1e9 - age))
    size = store.path(keys[0]).stat().st_size
    assert store.make_room(size, 4 * size, keep={keys[0]})
    assert [key in store for key in keys] == [True, False, True, True], "the oldest that is not kept goes"
    assert not store.make_room(4 * size, 4 * size, keep={keys[0]})
    assert [key in store for key in keys] == [True, False, True, True], "what cannot fit removes nothing"


def _hold(store, ready, done):
    store.hold()
    ready.set()
    done.wait(20)


def test_nothing_is_evicted_while_another_job_reads(store, tmp_path):
    key = filled(store, tmp_path)
    size = store.path(key).stat().st_size
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(store, ready, done))
    other.start()
    try:
        assert ready.wait(60)
        assert not store.make_room(size, size, keep=set())
        assert key in store
    finally:
        done.set()
        other.join()
    assert store.make_room(size, size, keep=set())
    assert key not in store


def test_what_is_released_can_be_evicted_though_a_forked_worker_lives(store, tmp_path):
    key = filled(store, tmp_path)
    size = store.path(key).stat().st_size
    store.hold()
    context = multiprocessing.get_context("fork")
    done = context.Event()
    worker = context.Process(target=done.wait, args=(60,))
    worker.start()
    try:
        store.release()
        assert store.make_room(size, size, keep=set()) and key not in store
    finally:
        done.set()
        worker.join()


def test_a_cache_that_cannot_be_used_is_told_in_one_line(tmp_path):
    folder = tmp_path / "cache"
    folder.write_text("a file")
    store = FeatureStore(folder, "encoders-1", {})
    for use in (store.hold, lambda: store.make_room(1, 10, keep=set()), lambda: store.put("ab12", torch.ones(1))):
        with pytest.raises(SurgvqaError, match=r"feature cache cannot be .*--feature_cache off"):
            use()


def test_other_users_can_read_what_they_may(store, tmp_path):
    old = os.umask(0o027)
    try:
        assert store.path(filled(store, tmp_path)).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)


def test_the_ram_copy_is_bounded(store, tmp_path):
    store.ram_bytes = 3 * 64
    keys = [filled(store, tmp_path, f"{n}.jpg", bytes([n])) for n in range(5)]
    for key in keys:
        store.get(key)
    assert len(store._ram) == 3 and store._ram_used == 3 * 64
