"""Which tensor lies in which shard, and in which pieces it is made."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from surgvqa.checkpoint.headers import TensorInfo
from surgvqa.checkpoint.shards import Copy, Files, plan_shards, split_rows, tensor_bytes


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 4000), st.integers(1, 100_000))
def test_rows_are_split_near_equally(rows: int, row_bytes: int, block: int) -> None:
    parts = split_rows((rows, 3), row_bytes, block)
    assert [a for a, _ in parts] == [sum(n for _, n in parts[:i]) for i in range(len(parts))]
    assert sum(n for _, n in parts) == rows
    sizes = {n for _, n in parts}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) * row_bytes <= max(block + row_bytes, row_bytes)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["BF16", "F32", "I64", "U8"]), st.integers(0, 50)), min_size=1),
    st.integers(1, 300),
)
def test_shards_hold_everything_once_in_order(tensors: list[tuple[str, int]], most: int) -> None:
    files = Files()
    sources = [
        Copy(f"t{i}", TensorInfo(f"t{i}", dtype, (n,), Path("x"), 0, n), files) for i, (dtype, n) in enumerate(tensors)
    ]
    shards = plan_shards(sources, most)
    assert sorted((s.name for shard in shards for s in shard.sources), key=lambda n: int(n[1:])) == [
        s.name for s in sources
    ]
    for shard in shards:
        size = shard.nbytes - len(shard.head)
        assert size <= most or len([s for s in shard.sources if tensor_bytes(s)]) == 1
        assert len(shard.head) % 8 == 0
    names = [s.file for s in shards]
    assert names == sorted(names) and len(set(names)) == len(names)
