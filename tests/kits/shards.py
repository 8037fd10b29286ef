"""A folder that looks like a checkpoint, of shards of any size."""

import random
from pathlib import Path


def checkpoint(folder: Path, shards: dict[str, int], seed: int = 0) -> Path:
    """A folder that looks like a checkpoint; sizes in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(seed)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "empty.txt").write_text("")
    for name, size in shards.items():
        (folder / name).write_bytes(noise.randbytes(size))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
