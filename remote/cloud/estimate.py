"""What a training would take and cost on a card that is for rent, before anything is rented.

Measured on one H100 SXM (docs/benchmarks.md, 2026-11-27): 0.2672 s for a sample of 3,880 tokens and 0.1801 s for one of
2,540, which is 70 microseconds a token; 0.11 s to encode a sample once. Other cards are a guess: by the dense BF16 rate
that NVIDIA's data sheets give, as if all of it were arithmetic. Setting up, uploading and answering are not in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TOKEN_S = 70e-6
ENCODE_S = 0.11
EVALUATED = 1 / 3
"""A forward pass alone, as a fraction of a step's time. A guess."""
START_S = 60.0
"""Seconds for loading and the first compilation. A guess."""
MEASURED_ON = "H100 SXM"
TFLOPS = {
    r"\bB200\b": 2250.0,
    r"\b(?:G?H200)\b": 989.0,
    r"\bH100\b.*\bPCIe\b": 756.0,
    r"\bH100\b": 989.0,
    r"\bA100\b": 312.0,
    r"\bA6000\b": 155.0,
    r"\bA10\b": 125.0,
}
"""Dense BF16 TFLOPS with the card's name, the first that matches. Cards before Ampere have no BF16."""


@dataclass(frozen=True)
class Work:
    """A training, as far as its time depends on it."""

    samples: int
    """Of the training."""
    evaluated: int
    """Of the evaluation."""
    epochs: float
    tokens: int
    """Of one sample."""

    def seconds(self, gpu: str) -> float | None:
        """The estimate for one card of this name, or None for an unknown card."""
        rate = next((rate for pattern, rate in TFLOPS.items() if re.search(pattern, gpu, re.IGNORECASE)), None)
        if rate is None:
            return None
        shown = self.epochs * (self.samples + EVALUATED * self.evaluated)
        once = ENCODE_S * (self.samples + self.evaluated)
        return START_S + (shown * self.tokens * TOKEN_S + once) * TFLOPS[r"\bH100\b"] / rate
