"""A saved state on its way to another machine: what cannot be read is reported, and keeps no rank waiting."""

import pytest

torch = pytest.importorskip("torch")
from surgvqa.training import carry  # noqa: E402

pytestmark = pytest.mark.model


@pytest.fixture
def sent(monkeypatch):
    """The bytes of each block that goes to the other ranks."""
    blocks: list[bytes] = []
    monkeypatch.setattr(carry, "CHUNK", 4)
    monkeypatch.setattr(
        torch.distributed, "broadcast", lambda block, rank: blocks.append(block.numpy().tobytes()), raising=False
    )
    return blocks


def test_every_block_is_sent_whatever_happens_to_the_file(tmp_path, sent):
    source = tmp_path / "adapter_model.safetensors"
    source.write_bytes(b"0123456789")
    cpu = torch.device("cpu")
    assert carry._carry_file(source, None, 10, True, cpu) == "" and sent == [b"0123", b"4567", b"89"]
    sent.clear()
    assert "has become shorter" in carry._carry_file(source, None, 12, True, cpu)
    assert [len(block) for block in sent] == [4, 4, 4]
    sent.clear()
    source.unlink()
    assert "No such file" in carry._carry_file(source, None, 10, True, cpu)
    assert [len(block) for block in sent] == [4, 4, 2]
