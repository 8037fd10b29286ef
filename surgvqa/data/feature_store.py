"""The feature cache: outputs of the frozen encoders on disk. Each frame and question is encoded only once.

Each entry is a safetensors file named by its key, a hash of the encoders' fingerprint, the processor's settings, and
the content of the frame or sound file. A frame that several clips share is one entry. Entries are written under a
temporary name and renamed, and a checksum is verified on each read, so concurrent writers and kill -9 leave no wrong
entries.

    <folder>/in_use.lock     a shared lock of every job that uses the cache; eviction needs an exclusive lock
             ab/ab12….safetensors
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from surgvqa.checkpoint.folder import Checkpoint
from surgvqa.errors import SurgvqaError

SAMPLED_BYTES = 4096
"""Bytes from the start, the middle and the end of each encoder tensor that go into the fingerprint."""
ENCODERS = ("visual.", "audio_encoder.")


def encoder_fingerprint(checkpoint: Checkpoint, dtype: torch.dtype) -> str:
    """A hash that identifies the encoders: name, dtype, shape and sampled bytes of each tensor, and the dtype used."""
    digest = hashlib.blake2b(str(dtype).encode(), digest_size=16)
    for name in sorted(n for n in checkpoint.tensors if n.startswith(ENCODERS)):
        info = checkpoint.tensors[name]
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        with open(info.file, "rb") as file:
            for place in (0, info.nbytes // 2, max(0, info.nbytes - SAMPLED_BYTES)):
                file.seek(info.offset + place)
                digest.update(file.read(min(SAMPLED_BYTES, info.nbytes - place)))
    return digest.hexdigest()


class FeatureStore:
    """The entries of one pair of encoders. Can be pickled for worker processes, each of which has its own LRU cache."""

    def __init__(self, folder: Path, fingerprint: str, settings: dict[str, Any], ram_bytes: int = 1_000_000_000):
        self.folder = Path(folder)
        self.context = f"{fingerprint} {json.dumps(settings, sort_keys=True, default=str)}"
        self.ram_bytes = ram_bytes
        self._content: dict[str, str] = {}
        self._ram: OrderedDict[str, tuple[torch.Tensor, dict[str, str]]] = OrderedDict()
        self._ram_used = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ram": OrderedDict(), "_ram_used": 0, "_lock": None}

    # --- keys --------------------------------------------------------------------------------------------------------

    def frame_key(self, path: str, image_size: int) -> str:
        """The key of a frame that is scaled to at most `image_size` pixels."""
        return self._key("frame", path, image_size)

    def audio_key(self, path: str) -> str:
        """The key of a spoken question."""
        return self._key("audio", path, 0)

    def _key(self, kind: str, path: str, size: int) -> str:
        if path not in self._content:
            with open(path, "rb") as file:
                self._content[path] = hashlib.file_digest(file, "blake2b").hexdigest()
        text = f"{self.context} {kind} {size} {self._content[path]}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def path(self, key: str) -> Path:
        """The file of an entry."""
        return self.folder / key[:2] / f"{key}.safetensors"

    # --- reading and writing -----------------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def get(self, key: str) -> tuple[torch.Tensor, dict[str, str]] | None:
        """(features, notes) of an entry; None if there is none or it is damaged. A damaged entry is deleted."""
        if key in self._ram:
            self._ram.move_to_end(key)
            return self._ram[key]
        path = self.path(key)
        try:
            data = path.read_bytes()
            features = load_safetensors(data)["features"]
            length = int.from_bytes(data[:8], "little")
            notes = json.loads(data[8 : 8 + length])["__metadata__"]
            if zlib.crc32(memoryview(data)[8 + length :]) != int(notes["crc32"]):
                raise ValueError("checksum")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self._remember(key, (features, notes))
        return features, notes

    def put(self, key: str, features: torch.Tensor, **notes: str) -> None:
        """Writes an entry atomically. Raises SurgvqaError when the disk is full."""
        path, features = self.path(key), features.detach().cpu().contiguous()
        checksum = zlib.crc32(features.view(torch.uint8).numpy().data)
        data = save_safetensors({"features": features}, metadata={**notes, "crc32": str(checksum)})
        temporary = path.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}.tmp")
        with _one_line_errors(path, "written", "free some disk space"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)  # not with tempfile, whose files other users cannot read
                os.replace(temporary, path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise

    def _remember(self, key: str, entry: tuple[torch.Tensor, dict[str, str]]) -> None:
        size = entry[0].nbytes
        if size > self.ram_bytes:
            return
        self._ram[key] = entry
        self._ram_used += size
        while self._ram_used > self.ram_bytes:
            _, (old, _) = self._ram.popitem(last=False)
            self._ram_used -= old.nbytes

    # --- keeping it bounded ------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Marks the cache as in use until this process ends. From now on, no other job evicts entries."""
        with _one_line_errors(self.folder, "used", "name another --feature_cache_dir"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "in_use.lock", "a")  # noqa: SIM115  (held for the life of the process)
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def release(self) -> None:
        """Ends `hold`: entries may be evicted again, even if a data loader's worker still reads them."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing is not enough, because workers inherit the descriptor
        self._lock.close()

    def make_room(self, needed: int, capacity: int, keep: set[str]) -> bool:
        """Evicts the least recently used entries until `needed` more bytes fit into `capacity`; False if they cannot.

        Entries in `keep` stay, and nothing is evicted while another job uses the cache. Call before `hold`.
        """
        with _one_line_errors(self.folder, "used", "name another --feature_cache_dir"):
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob("??/.*.tmp"):  # left by a killed writer; a live one would hold the lock
                if self._is_unused():
                    stale.unlink(missing_ok=True)
        entries = []
        for file in self.folder.glob("??/*.safetensors"):
            with contextlib.suppress(OSError):
                status = file.stat()
                entries.append((max(status.st_atime, status.st_mtime), status.st_size, file))
        used = sum(size for _, size, _ in entries)
        if used + needed <= capacity:
            return True
        spare = sorted(e for e in entries if e[2].stem not in keep)
        if used + needed - sum(size for _, size, _ in spare) > capacity or not self._is_unused():
            return False
        for _, size, file in spare:
            if used + needed <= capacity:
                break
            file.unlink(missing_ok=True)
            used -= size
        return True

    def _is_unused(self) -> bool:
        with open(self.folder / "in_use.lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            return True


@contextlib.contextmanager
def _one_line_errors(path: Path, how: str, way_out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SurgvqaError(
            f"{path}: the feature cache cannot be {how} ({error.strerror}); {way_out}, or use --feature_cache off"
        ) from None
