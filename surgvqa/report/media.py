"""Frames and recordings for the page, embedded in small size or linked by path.

A clip becomes one WebP strip of its frames side by side, which needs one header and one page element, not eight.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from surgvqa.data.lookup import AudioIndex, FrameIndex
from surgvqa.data.samples import Sample
from surgvqa.errors import UsageError

WIDTHS = (320, 256, 208, 160, 128, 96)
"""Thumbnail widths in pixels. The largest that keeps the page below its limit is used."""
QUALITY = 55
MOST_FRAMES = 40  # in a strip, because WebP is at most 16,383 pixels wide
PROBED = 12  # clips encoded to choose the width
AUDIO_SHARE = 0.6  # largest share of the page
BASE64 = 4 / 3
MIME = {".mp3": "audio/mpeg", ".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg", ".m4a": "audio/mp4"}

Progress = Callable[[int, int], None]


@dataclass
class Clip:
    """The frames and the recording of one sample on the page."""

    names: list[str] = field(default_factory=list)
    files: list[Path | None] = field(default_factory=list)
    """One for each name; None if it is missing."""
    audio: Path | None = None
    notes: list[str] = field(default_factory=list)
    """Messages on what is missing or unreadable."""
    strip: str = ""
    """Name of the embedded strip; empty if there is none."""
    ratio: float = 4 / 3
    """Width of a frame divided by its height."""
    urls: list[str] = field(default_factory=list)
    """URLs of linked frames."""
    sound: str = ""
    """Name of the embedded recording or URL of the linked one."""


@dataclass
class Store:
    """The embedded media, {name: "mime;base64,…"}, and counts of what did not fit."""

    limit_bytes: float
    parts: dict[str, str] = field(default_factory=dict)
    used_bytes: float = 0.0
    width: int = 0
    """Width of a thumbnail in pixels."""
    left_out: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, mime: str, content: bytes, kind: str) -> bool:
        """Adds the content if it fits; returns whether it did."""
        size = len(content) * BASE64 + 60
        if self.used_bytes + size > self.limit_bytes:
            self.left_out[kind] = self.left_out.get(kind, 0) + 1
            return False
        self.parts[name] = f"{mime};base64,{base64.b64encode(content).decode()}"
        self.used_bytes += size
        return True


def find_media(samples: Sequence[Sample | None], frames_dir: str | None, audio_dir: str | None) -> list[Clip]:
    """The files of each sample. A missing file is noted in its clip, a missing folder raises UsageError."""
    frames = FrameIndex(frames_dir) if frames_dir else None
    audio = AudioIndex(audio_dir, [s for s in samples if s]) if audio_dir else None
    return [_clip(sample, frames, audio) if sample else Clip() for sample in samples]


def _clip(sample: Sample, frames: FrameIndex | None, audio: AudioIndex | None) -> Clip:
    names = list(sample.frames)
    clip = Clip(names)
    if len(names) > MOST_FRAMES:
        clip.names = [names[round(i * (len(names) - 1) / (MOST_FRAMES - 1))] for i in range(MOST_FRAMES)]
        clip.notes.append(f"{MOST_FRAMES} of {len(names)} frames are shown")
    for name in clip.names if frames else ():
        assert frames
        try:
            clip.files.append(frames.find(name))
        except UsageError as error:
            clip.files.append(None)
            clip.notes.append(str(error))
    if audio:
        try:
            clip.audio = audio.find(sample)
        except UsageError as error:
            clip.notes.append(str(error))
    return clip


# --- linked -----------------------------------------------------------------------------------------------------------


def link(clips: Iterable[Clip], page: Path) -> None:
    """Links all files by their path relative to the page's folder."""
    folder = page.resolve().parent

    def address(file: Path) -> str:
        return quote(os.path.relpath(os.path.abspath(file), folder).replace(os.sep, "/"))

    for clip in clips:
        clip.urls = [address(file) if file else "" for file in clip.files]
        clip.sound = address(clip.audio) if clip.audio else ""


# --- embedded ---------------------------------------------------------------------------------------------------------


def embed(clips: Sequence[Clip], limit_bytes: float, progress: Progress = lambda done, total: None) -> Store:
    """Puts recordings, and then the largest thumbnails that fit, into a store of at most `limit_bytes`.

    `progress` is called with (clips done, all clips).
    """
    store = Store(limit_bytes)
    _embed_audio(clips, store)
    seen: dict[tuple[Path | None, ...], list[Clip]] = {}
    for clip in clips:
        if any(clip.files):
            seen.setdefault(tuple(clip.files), []).append(clip)
    shown = [group[0] for group in seen.values()]
    store.width = _width(shown, store.limit_bytes - store.used_bytes)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        strips = pool.map(lambda clip: _strip(clip, store.width), shown)
        for number, (group, content) in enumerate(zip(seen.values(), strips)):
            name = f"clip{number}"
            if content and store.add(name, "image/webp", content, "clips"):
                for clip in group:
                    clip.strip, clip.ratio, clip.notes = name, group[0].ratio, clip.notes or group[0].notes
            progress(number + 1, len(shown))
    return store


def _width(clips: Sequence[Clip], room: float) -> int:
    """The largest width at which the clips fit into `room` bytes, estimated from some of them."""
    probed = clips[:: max(1, len(clips) // PROBED)][:PROBED]
    for width in WIDTHS:
        sizes = [len(_strip(Clip(c.names, c.files), width)) * BASE64 for c in probed]
        if not sizes or 1.1 * sum(sizes) / len(sizes) * len(clips) <= room:
            return width
    return WIDTHS[-1]


def _strip(clip: Clip, width: int) -> bytes:
    """The clip's frames side by side as WebP, each `width` pixels wide; empty if none can be read.

    An unreadable frame is left blank and noted.
    """
    from PIL import Image, ImageOps

    images: list[Image.Image | None] = []
    for name, file in zip(clip.names, clip.files):
        image = None
        if file is not None:
            try:
                with Image.open(file) as opened:
                    opened.draft(
                        "RGB", (6 * width // 5, 6 * width // 5)
                    )  # a JPEG can be decoded at a half or a quarter of its size
                    image = ImageOps.exif_transpose(opened).convert("RGB")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                clip.notes.append(f"frame {name} cannot be read: {error}")
        images.append(image)
    first = next((image for image in images if image), None)
    if first is None:
        return b""
    clip.ratio = min(4.0, max(0.25, first.width / first.height))
    height = round(width / clip.ratio)
    strip = Image.new("RGB", (width * len(images), height))
    for number, image in enumerate(images):
        if image:
            fits = (
                abs(width * image.height / image.width - height) < 1
            )  # ignores rounding, to avoid a black line beside it
            small = image.resize((width, height)) if fits else ImageOps.contain(image, (width, height))
            strip.paste(small, (number * width + (width - small.width) // 2, (height - small.height) // 2))
    content = io.BytesIO()
    strip.save(content, "WEBP", quality=QUALITY, method=2)
    return content.getvalue()


def _embed_audio(clips: Sequence[Clip], store: Store) -> None:
    """Embeds recordings unchanged or, if they exceed their share, as small MP3s (needs soundfile)."""
    asked: dict[Path, list[Clip]] = {}
    for clip in clips:
        if clip.audio:
            asked.setdefault(clip.audio, []).append(clip)
    share = AUDIO_SHARE * store.limit_bytes
    small = sum(file.stat().st_size for file in asked) * BASE64 > share
    room = Store(share)
    names: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for group, (content, mime, problem) in zip(asked.values(), pool.map(lambda file: _sound(file, small), asked)):
            digest = hashlib.sha256(content).hexdigest()
            if problem:
                for clip in group:
                    clip.notes.append(problem)
            elif digest in names or room.add(f"sound{len(names)}", mime, content, "recordings"):
                name = names.setdefault(digest, f"sound{len(names)}")
                for clip in group:
                    clip.sound = name
    store.parts.update(room.parts)
    store.used_bytes += room.used_bytes
    store.left_out.update(room.left_out)


def _sound(file: Path, small: bool) -> tuple[bytes, str, str]:
    """(a recording's bytes, its MIME type, why it cannot be read or "")."""
    try:
        content = file.read_bytes()
    except OSError as error:
        return b"", "", f"{file}: cannot be read: {error.strerror}"
    mime = MIME[file.suffix.lower()]
    return (*(_smaller(content, mime) if small else (content, mime)), "")


def _smaller(content: bytes, mime: str) -> tuple[bytes, str]:
    """The recording as a mono MP3 if that is smaller; unchanged without soundfile or if it cannot be decoded."""
    try:
        import soundfile

        sound, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        encoded = io.BytesIO()
        soundfile.write(encoded, sound.mean(axis=1), rate, format="MP3", compression_level=0.8)
    except Exception:  # no soundfile, no MP3 support, or a damaged file: keep the original
        return content, mime
    if encoded.tell() < len(content):
        return encoded.getvalue(), "audio/mpeg"
    return content, mime
