"""How many tokens a spoken question takes. Imports nothing, because the panel uses it to predict memory."""

from __future__ import annotations

import math

SAMPLE_RATE = 16_000
HOP = 160
"""Seconds per encoder position: two of Whisper's mel frames, which are 160 samples (10 ms) apart."""


def tokens_to(end_s: float, positions: int, span: str, margin_s: float) -> int:
    """How many of the encoder's `positions` (20 ms each) the language model gets for a question that ends at `end_s`.

    With `span` "full" all of them, with "spoken" those up to `margin_s` after the end.
    """
    if span == "full":
        return positions
    return min(positions, max(1, math.ceil((end_s + margin_s) * SAMPLE_RATE / (2 * HOP))))
