"""What both ends agree on: the mark before the agent's first line, its beat, the frame of bulk data."""

from __future__ import annotations

import struct

MARK = b"\x1esurgvqa\x1e\n"
BEAT_S = 2.0
FRAME = struct.Struct(">IQI")  # file index, offset, length; then that many bytes
