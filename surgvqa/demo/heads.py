"""What some heads of the demo's random language model look for or look at, as heads of a trained model come to do.

Left to chance, attention spreads over all of a prompt, and a few minutes' training cannot find out where in a frame
something is or which frame comes first. So two kinds of heads are given by design; no label, question or answer is in
them. *Finding* heads look for what carries a mark: spoken words, pieces of frames, the token that ends a frame.
*Looking* heads look at a fixed place before them, by rotary position: what ends a frame looks at its four sides. They
come in pairs whose outputs are subtracted, so that a pair says left less right, or late frames less early ones, and
what is the same on both sides cancels. The second layer's values read what the first layer's pairs have written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from surgvqa.demo.weights import DemoSizes

    Tensors = dict[str, np.ndarray]

SPOKEN, SEEN, ENDED = 0, 1, 2
"""Marks: a word is spoken here, a piece of a frame is seen here, a frame has ended here."""
MARK, END_MARK = 0.5, 3.0
"""How strongly a spoken word or a piece of a frame is marked, and the token that ends a frame."""
HEED = 1.6
"""How strongly a finding head heeds its mark."""
FOUND, SIDE, COMPARED = 2.5, 4.0, 2.0
"""Gains of the values: of what is found (it is few of all positions), of a frame's sides, of frames compared."""
LATE, EARLY = -26.0, -62.0
"""Middle columns of the last and the first frames, in positions from where the answer begins."""
TIME_PAIR, TIME = 3, 6.0
"""Rotary pair by which late frames are told from early ones (half a turn over a clip), and how sharply (logits)."""
ROWS, COLUMNS = (0, 1), (2, 3, 4, 5)
"""Rotary pairs that turn with a frame's rows and columns (mrope_section 0, 2, 6). The slower ones among the columns'
hardly differ within a frame: they keep a head from looking at other frames."""


@dataclass(frozen=True)
class Find:
    """A group of heads that look for a mark anywhere."""

    mark: int
    gain: float = FOUND
    in_time: bool = False
    """Whether its first head looks among the late frames and its second among the early ones."""
    reads: int | None = None
    """Group of the layer before whose first head's outputs the values read; None: a random mixture of everything."""


@dataclass(frozen=True)
class Look:
    """A group of two heads that look at two places of the frame that has just ended."""

    sharpness: dict[int, float]
    """Rotary pair -> logits by which the place looked at stands above one half a turn away."""
    rows: tuple[float, float]
    """Position of each head's place from the end of the frame, whose rows stand at -4 to -1; as `columns`."""
    columns: tuple[float, float]


MIDDLE = (-2.5, -2.5)
LEFT_RIGHT = Look({1: 3.0, **dict.fromkeys(COLUMNS, 20.0)}, rows=MIDDLE, columns=(-4.0, -1.0))
TOP_BOTTOM = Look({0: 3.0, **dict.fromkeys(COLUMNS, 20.0)}, rows=(-4.0, -1.0), columns=MIDDLE)
GROUPS: tuple[tuple[Find | Look, ...], ...] = (
    (Find(SPOKEN), Find(SEEN), LEFT_RIGHT, TOP_BOTTOM),
    (
        Find(SPOKEN),
        Find(SEEN, COMPARED, in_time=True),
        Find(ENDED, COMPARED, in_time=True, reads=2),
        Find(ENDED, COMPARED, in_time=True, reads=3),
    ),
)
"""What the key-value groups of the first layers do; further ones are left to chance."""


def marks(size: int) -> np.ndarray:
    """[3, size]: orthogonal patterns of +-1 in the hidden states, one for each mark."""
    import numpy as np

    return np.stack([np.resize(p, size) for p in ([1.0, 1.0, -1.0, -1.0], [1.0, -1.0], [1.0, -1.0, -1.0, 1.0])])


def shape_heads(tensors: Tensors, sizes: DemoSizes) -> None:
    """Writes `GROUPS` into the language model's random tensors. The values do not carry the marks on."""
    all_marks = marks(sizes.hidden_size)
    for layer in range(sizes.num_hidden_layers):
        groups = GROUPS[layer][: sizes.num_key_value_heads] if layer < len(GROUPS) else ()
        for number, group in enumerate(groups):
            _Heads(tensors, sizes, layer, number).shape(group)
        value = tensors[f"model.layers.{layer}.self_attn.v_proj.weight"]
        value -= value @ all_marks.T @ all_marks / sizes.hidden_size


class _Heads:
    """One key-value group of one layer: its rows of q, k and v and its columns of o."""

    def __init__(self, tensors: Tensors, sizes: DemoSizes, layer: int, number: int):
        self.tensors, self.layer, self.sizes = tensors, layer, sizes
        self.size, self.half = sizes.head_dim, sizes.head_dim // 2
        a_group = sizes.num_attention_heads // sizes.num_key_value_heads
        self.heads = [(number * a_group + i) * self.size for i in range(a_group)]
        self.key = number * self.size

    def part(self, name: str, layer: int | None = None) -> np.ndarray:
        return self.tensors[f"model.layers.{self.layer if layer is None else layer}.self_attn.{name}"]

    def shape(self, group: Find | Look) -> None:
        for first in self.heads:
            self.part("q_proj.weight")[first : first + self.size] = 0
        value = self.part("v_proj.weight")[self.key : self.key + self.size]
        if isinstance(group, Look):
            self.part("k_proj.weight")[self.key : self.key + self.size] = 0
            for pair, logits in group.sharpness.items():
                self.look_at(pair, group.rows if pair in ROWS else group.columns, logits)
            value *= SIDE
            self.subtract()
            return
        self.find(group.mark)
        if group.reads is not None and self.layer:
            a_group = len(self.heads)
            written = group.reads * a_group * self.size
            value[:] = self.inverse(self.part("o_proj.weight", self.layer - 1)[:, written : written + self.size])
        value *= group.gain
        if group.in_time:
            self.part("k_proj.weight")[[self.key + TIME_PAIR, self.key + TIME_PAIR + self.half]] = 0
            self.look_at(TIME_PAIR, (LATE, EARLY), TIME)
            self.subtract()

    def find(self, mark: int) -> None:
        """Keys read the mark in the dimension that rotary positions turn least; the queries' bias asks for it."""
        wide, slow = self.sizes.hidden_size, self.half - 1
        for first in self.heads:
            self.part("q_proj.bias")[first + slow] = HEED
        self.part("k_proj.weight")[self.key + slow] = HEED * marks(wide)[mark] / math.sqrt(wide)

    def look_at(self, pair: int, places: tuple[float, float], logits: float) -> None:
        """Constant keys and queries of a rotary pair: the score is highest where the key stands at the head's place."""
        turn = self.sizes.rope_theta ** (-pair / self.half)
        strength = math.sqrt(logits * math.sqrt(self.size))
        for i, first in enumerate(self.heads):
            angle = turn * places[i % 2]
            self.part("q_proj.bias")[first + pair] = strength * math.cos(angle)
            self.part("q_proj.bias")[first + pair + self.half] = strength * math.sin(angle)
        self.part("k_proj.bias")[self.key + pair] = strength

    def subtract(self) -> None:
        """Each second head's output is taken from that of the one before it."""
        out = self.part("o_proj.weight")
        for plus, minus in zip(self.heads[::2], self.heads[1::2]):
            out[:, minus : minus + self.size] = -out[:, plus : plus + self.size]

    @staticmethod
    def inverse(matrix: np.ndarray) -> np.ndarray:
        import numpy as np

        return np.linalg.pinv(matrix)
