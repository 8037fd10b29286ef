"""A tiny random checkpoint of the real architecture, in the author's format, and its model."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from tiny_model import load, write_checkpoint  # noqa: E402
from transformers import modeling_flash_attention_utils  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def model(checkpoint):
    return load(checkpoint)


@pytest.fixture
def flash_attn(monkeypatch):
    """flash-attn needs a GPU: transformers gets functions that compute the same where it would import the kernels'.

    Gives a list that grows by the arguments (cu_seqlens_q, cu_seqlens_k, max_seqlen) of each variable-length call.
    """
    calls = []

    def attend(q, k, v, scale, **how):
        q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True, **how).transpose(-3, -2)

    def fixed(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        return attend(q, k, v, softmax_scale, is_causal=causal)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
               causal=False):  # fmt: skip
        if not torch.compiler.is_compiling():  # a list that grows would be compiled for anew each time
            calls.append((cu_seqlens_q, cu_seqlens_k, max_seqlen_q))
        place = torch.arange(len(q), dtype=cu_seqlens_q.dtype)
        of_sample = torch.searchsorted(cu_seqlens_q, place, right=True)
        seen = of_sample[:, None] == of_sample
        return attend(q[None], k[None], v[None], softmax_scale, attn_mask=seen.tril() if causal else seen)[0]

    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: (fixed, varlen, *[None] * 3))
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    return calls
