"""Hand-drawn boxes of the lesions in each frame, such as REAL-Colon's annotations. Standard library only.

Two formats are supported:

- A folder of XML files, one per frame, in Pascal VOC's format: `<video>_annotations/<video>_<frame number>.xml` (also
  `<video>/…`, or all in one folder), with `size/width`, `size/height` and for each `object` its `unique_id` and
  `bndbox/xmin, xmax, ymin, ymax` in pixels. A file without an object means a frame without a lesion. This is the format
  of https://github.com/cosmoimd/real-colon-dataset.
- A CSV file with the columns frame (`<video>_<frame number>`), width, height, lesion, xmin, xmax, ymin, ymax, one box
  per row. A row without coordinates means a frame without a lesion.

The files are not trusted: their size is bounded, and an invalid box raises a UsageError that names it.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from surgvqa.errors import UsageError
from surgvqa.files import open_regular
from surgvqa.untrusted import printable

MAX_XML_BYTES = 1 << 16
MAX_CSV_BYTES = 1 << 30
COLUMNS = ("frame", "width", "height", "lesion", "xmin", "xmax", "ymin", "ymax")
CORNERS = ("xmin", "xmax", "ymin", "ymax")


class Centre(NamedTuple):
    """The centre of a box, in shares of the frame's width and height from the upper left corner."""

    x: float
    y: float


Lesions = Mapping[str, Centre]
"""The lesions of one frame: {name: centre}."""


class Boxes:
    """The boxes of all frames. Frames have the names used in samples, `<video>_<frame number>`."""

    def __init__(self, path: str | os.PathLike[str]):
        """Raises UsageError when `path` has no boxes or is an invalid CSV file."""
        self.path = Path(path)
        self._known: dict[str, Lesions | None] = {}
        self._is_folder = self.path.is_dir()
        if not self._is_folder:
            self._known |= _read_csv(self.path)

    def lesions(self, frame: str) -> Lesions | None:
        """The lesions of a frame; None if the frame is not annotated. Raises UsageError for an invalid file."""
        if frame not in self._known and self._is_folder:
            self._known[frame] = self._read(frame)
        return self._known.get(frame)

    def _read(self, frame: str) -> Lesions | None:
        video = frame.rpartition("_")[0]
        if "/" in frame or "\0" in frame or video in ("", ".", ".."):
            return None
        for folder in (f"{video}_annotations", video, "."):
            file = self.path / folder / f"{frame}.xml"
            if file.is_file():
                return _read_xml(file)
        return None


def _read_xml(file: Path) -> Lesions:
    try:
        with open_regular(file) as stream:
            text = stream.read(MAX_XML_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{printable(str(file))}: cannot be read: {error.strerror}") from None
    if len(text) > MAX_XML_BYTES or b"<!" in text.replace(b"<!--", b""):  # an entity can expand to any size
        raise UsageError(
            f"{printable(str(file))}: larger than 64 KiB, or with a document type; expected boxes of a frame"
        )
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UsageError(f"{printable(str(file))}: not valid XML ({error})") from None

    def values() -> Iterator[tuple[str, Centre]]:
        size = {name: root.findtext(f"size/{name}") for name in ("width", "height")}
        for number, found in enumerate(root.iter("object"), 1):
            corners = {name: found.findtext(f"bndbox/{name}") for name in CORNERS}
            lesion = found.findtext("unique_id") or found.findtext("name") or "lesion"
            yield lesion.strip(), _centre({**size, **corners}, f"{file}: object {number}")

    return dict(values())


def _read_csv(file: Path) -> dict[str, Lesions]:
    found: dict[str, dict[str, Centre]] = {}
    try:
        with open_regular(file) as opened, TextIOWrapper(opened, encoding="utf-8-sig", newline="") as stream:
            if os.fstat(opened.fileno()).st_size > MAX_CSV_BYTES:
                raise UsageError(f"{file}: larger than 1 GiB; expected one box per row")
            rows = csv.DictReader(stream)
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise UsageError(f"{file}: no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
            for row in rows:
                lesions = found.setdefault(row["frame"] or "", {})
                if any(row[name] for name in CORNERS):
                    lesions[row["lesion"] or "lesion"] = _centre(row, f"{file}:{rows.line_num}")
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; expected a folder of XML files or a CSV file of boxes") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{file}: not a CSV file in UTF-8 ({error})") from None
    return dict(found)


def _centre(values: Mapping[str, str | None], place: str) -> Centre:
    """The centre of a box from its corners and the frame's size, all in pixels. Raises UsageError if invalid."""
    numbers = {}
    for name in ("width", "height", *CORNERS):
        try:
            numbers[name] = float(values.get(name) or "")
        except ValueError:
            numbers[name] = math.nan
        if not math.isfinite(numbers[name]):
            raise UsageError(printable(f"{place}: {name} is {values.get(name)!r}, expected a number of pixels"))
    width, height, left, right, top, bottom = numbers.values()
    if not (width > 0 and height > 0 and left <= right and top <= bottom):
        found = f"a box from {left:g} to {right:g} and {top:g} to {bottom:g} in a frame of {width:g}x{height:g}"
        raise UsageError(printable(f"{place}: {found}; expected xmin <= xmax, ymin <= ymax and a size"))
    return Centre((left + right) / 2 / width, (top + bottom) / 2 / height)
