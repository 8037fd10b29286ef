"""Finds truncated sound files from their container alone, because decoders silently return what is left of them.

An interrupted download or copy leaves a WAV, MP3, Ogg or MP4 file whose header promises more than the file has.
Standard library only.
"""

from __future__ import annotations

import struct

STREAMED = 0x7FFF0000
"""A WAV writer that cannot fill in the size afterwards leaves 0 or a size from here to 2³² − 1."""
W64_RIFF = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
"""How a Wave64 file begins."""
MPEG_KBPS = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""{(MPEG-1, layer): kbit/s by index} (ISO/IEC 11172-3 and 13818-3)."""
MPEG_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
"""{version bits: sample rates in Hz by index}."""


def missing_part(data: bytes) -> str | None:
    """What a truncated sound file lacks, as a message; None for a complete file and for unknown formats."""
    if data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE":
        return _wav(data)
    if data[:4] == b"OggS":
        return _ogg(data)
    if data[4:8] == b"ftyp":
        return _mp4(data)
    if data[:4] in (b"FORM", b".snd") or data[:16] == W64_RIFF:
        return _whole_size(data)
    if data[:4] == b"fLaC":  # libsndfile itself refuses a truncated one
        return None
    return _mp3(data)


def _wav(data: bytes) -> str | None:
    place, rate, long = 12, 0, 0
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name == b"ds64" and data[:4] == b"RF64":
            long = int.from_bytes(data[place + 16 : place + 24], "little")  # the size of the sound, above 4 GiB too
        if name == b"fmt " and place + 24 <= len(data):
            rate = int.from_bytes(data[place + 16 : place + 20], "little")  # bytes per second
        if name == b"data":
            there = len(data) - place - 8
            size = long or size
            if size in (0, there) or (size >= STREAMED and not long) or size <= there:
                return None
            return f"its header promises {_seconds_or_bytes(size, rate)}, {_seconds_or_bytes(there, rate)} are there"
        place += 8 + size + size % 2
    return "its header promises sound that is not there"


def _whole_size(data: bytes) -> str | None:
    """Checks the size in the header of AIFF (FORM), of Sun's format (.snd; all ones: unknown) and of Sony's Wave64."""
    if data[:4] == b"FORM":
        promised = 8 + int.from_bytes(data[4:8], "big")
    elif data[:4] == b".snd":
        sound = int.from_bytes(data[8:12], "big")
        promised = 0 if sound == 0xFFFFFFFF else int.from_bytes(data[4:8], "big") + sound
    else:
        promised = int.from_bytes(data[16:24], "little")
    return f"its header promises {promised:,} bytes, {len(data):,} are there" if promised > len(data) else None


def _seconds_or_bytes(count: int, rate: int) -> str:
    return f"{count / rate:.1f} s" if rate else f"{count:,} bytes"


def _ogg(data: bytes) -> str | None:
    """Checks that the last page is complete and marked as the last (RFC 3533)."""
    place, ended = 0, False
    while data[place : place + 4] == b"OggS":
        if place + 27 > len(data):
            return "its last page is cut"
        flags, segments = data[place + 5], data[place + 26]
        lengths = data[place + 27 : place + 27 + segments]
        end = place + 27 + segments + sum(lengths)
        if len(lengths) < segments or end > len(data):
            return "its last page is cut"
        place, ended = end, bool(flags & 4)
    return None if ended else "its last page is missing"


def _mp4(data: bytes) -> str | None:
    """Checks that every box is as long as its header says (ISO/IEC 14496-12)."""
    place = 0
    while place + 8 <= len(data):
        size, header = int.from_bytes(data[place : place + 4], "big"), 8
        if size == 1 and place + 16 <= len(data):
            size, header = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        if size == 0:  # to the end of the file
            return None
        if size < header or place + size > len(data):
            name = data[place + 4 : place + 8].decode("latin-1")
            return f"its part {name!r} promises {size:,} bytes, {len(data) - place:,} are there"
        place += size
    return None if place == len(data) else "its last part is cut"


def _mp3(data: bytes) -> str | None:
    """Checks that the last frame is complete and that there are as many as the Xing or VBRI header says."""
    place = 0
    while data[place : place + 3] == b"ID3" and len(data) >= place + 10:  # its size has seven bits per byte
        a, b, c, d = data[place + 6 : place + 10]
        place += 10 + (a << 21 | b << 14 | c << 7 | d)
    promised, frames, samples, rate = None, 0, 0, 0
    while header := _mpeg_frame(data, place):
        length, samples, rate = header
        if place + length > len(data):
            if frames:
                return _missing_frames(promised, frames, samples, rate) or "its last frame is cut"
            return None  # only one frame: perhaps not an MP3 file; the decoder decides
        if (
            not frames
            and promised is None
            and (counted := _header_frame_count(data[place : place + length])) is not None
        ):
            promised = counted
        else:
            frames += 1
        place += length
    return _missing_frames(promised, frames, samples, rate) if frames or promised else None


def _missing_frames(promised: int | None, frames: int, samples: int, rate: int) -> str | None:
    if promised is None or frames + 1 >= promised:  # some writers count the header's frame too
        return None
    seconds = samples / rate
    return f"its header promises {promised * seconds:.1f} s, {frames * seconds:.1f} s are there"


def _mpeg_frame(data: bytes, place: int) -> tuple[int, int, int] | None:
    """(bytes, samples per channel, sample rate) of the MPEG audio frame at `place`; None if there is none."""
    if place + 4 > len(data):
        return None
    (word,) = struct.unpack_from(">I", data, place)
    version, layer = word >> 19 & 3, 4 - (word >> 17 & 3)
    kbps_index, rate_index, padding = word >> 12 & 15, word >> 10 & 3, word >> 9 & 1
    if word >> 21 != 0x7FF or version == 1 or layer == 4 or kbps_index in (0, 15) or rate_index == 3:
        return None
    mpeg1 = version == 3
    bits = 1000 * MPEG_KBPS[mpeg1, layer][kbps_index]
    rate = MPEG_RATES[version][rate_index]
    if layer == 1:
        return (12 * bits // rate + padding) * 4, 384, rate
    samples = 576 if layer == 3 and not mpeg1 else 1152
    return samples // 8 * bits // rate + padding, samples, rate


def _header_frame_count(frame: bytes) -> int | None:
    """Number of frames that follow, from a Xing, Info or VBRI header; None for any other frame."""
    for name in (b"Xing", b"Info"):
        place = frame.find(name, 4, 64)
        if place > 0 and place + 12 <= len(frame):
            has_count = frame[place + 7] & 1
            return int.from_bytes(frame[place + 8 : place + 12], "big") if has_count else None
    if frame[36:40] == b"VBRI" and len(frame) >= 54:
        return int.from_bytes(frame[50:54], "big")
    return None
