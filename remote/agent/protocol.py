"""What both ends agree on: the mark before the agent's first line, its beat, the frame of bulk data."""

from __future__ import annotations

import struct

MARK = b"\x1esurgvqa\x1e\n"
BEAT_S = 2.0
IDLE_S = 1800.0
"""Seconds that a rented GPU may do nothing after its job."""
IDLE_PERCENT = 10.0
"""Of utilization: below it a GPU does nothing."""
FRAME = struct.Struct(">IQI")  # file index, offset, length; then that many bytes
PACK = 0xFFFFFFFF
"""In place of the index: whole small files. The offset is their number, and their indices (INDEX) follow the frame;
then their contents, `length` bytes in all, one after another."""
HOLE = 0x80000000
"""Added to the index: these bytes are a hole of a sparse file, and none follow."""
INDEX = struct.Struct(">I")
SMALL = 1 << 20
"""Bytes of the largest file that travels in a pack: its hash is checked as it arrives."""
MAX_PACK = 4 << 20
MAX_PACK_FILES = 1 << 12
