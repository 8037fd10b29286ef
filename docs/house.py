"""Draws docs/house.svg: the rooms on their floors, with the imports that the sources have. `make house` renews it.

Floors are the import contracts of pyproject.toml, the text in a room is the first sentence of its docstring, and an
arrow is an import found by `ast`, also inside functions and behind TYPE_CHECKING. An import that follows from others
(a imports b, b imports c, a imports c) has no arrow; the <desc> of each room names all of them.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
import tomllib
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "house.svg"

Edge = tuple[str, str]
Point = tuple[float, float]
Slot = tuple[str, int]  # the room that an arrow leads to, the floor that it passes
Spot = str | Slot
Piece = tuple[Spot, Spot, bool]  # of an arrow: from, to, whether it ends there

STYLE = """
  .ground { fill: #f6f8fa } .house { fill: #ffffff; stroke: #c9d3dd } .floor { stroke: #e3e9ef }
  .room { fill: #eef4fb; stroke: #7fa8d1 } .name { fill: #14202c; font-weight: 700; font-size: 14px }
  .word { fill: #4d5d6c; font-size: 11px } .roof { fill: #14202c; font-weight: 700; font-size: 17px }
  .arrow { fill: none; stroke: #6d8bab; stroke-width: 1.3; opacity: .75 } .tip { fill: #6d8bab }
  .between { fill: none; stroke: #c9772b; stroke-width: 2 } .far { fill: #c9772b }
  .note { fill: #9a5a1e; font-size: 11px }
"""
DARK = """
  .ground { fill: #0d1117 } .house { fill: #131a22; stroke: #2f3c49 } .floor { stroke: #1e2833 }
  .room { fill: #1b2938; stroke: #47729e } .name, .roof { fill: #e6edf3 } .word { fill: #9fb0c0 }
  .arrow { stroke: #7d9cbd } .tip { fill: #7d9cbd } .between { stroke: #e5a25c } .far { fill: #e5a25c }
  .note { fill: #e5b57f }
"""


@dataclass
class House:
    """One package: floors of rooms from the top down, and what imports what."""

    name: str
    floors: list[list[str]]
    words: dict[str, str]
    imports: set[Edge] = field(default_factory=set)

    def floor_of(self) -> dict[str, int]:
        return {room: level for level, floor in enumerate(self.floors) for room in floor}


def room_of(module: str) -> tuple[str, str] | None:
    """("surgvqa", "data") for surgvqa.data.samples; None for what is not ours or is a package itself."""
    parts = module.split(".")
    return (parts[0], parts[1]) if len(parts) > 1 else None


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever the import stands; `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def first_sentence(path: Path) -> str:
    """What the room is, from its docstring: up to the first full stop, colon or bracket."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = " ".join(text.split("\n\n")[0].split())
    return re.split(r"[.;](?:\s|$)|\s\(", line)[0].replace("`", "")


def read_houses(root: Path) -> tuple[list[House], dict[Edge, set[Edge]]]:
    """The houses, and the imports between houses as {(house, house): {(room, room)}}."""
    linter = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]
    floors = {
        contract["containers"][0]: [[room.strip() for room in floor.split("|")] for floor in contract["layers"]]
        for contract in linter["contracts"]
        if contract.get("containers")
    }
    houses, between = {}, defaultdict(set)
    for name, levels in floors.items():
        sources = {room: root / name / room for floor in levels for room in floor}
        words = {
            room: first_sentence(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
            for room, path in sources.items()
            if path.is_dir() or path.with_suffix(".py").exists()
        }
        houses[name] = House(name, [[room for room in floor if room in words] for floor in levels], words)
    for path in sorted(file for name in linter["root_packages"] for file in (root / name).rglob("*.py")):
        here = room_of(".".join(path.relative_to(root).with_suffix("").parts))
        for there in {room_of(module) for module in imported(path)}:
            if here is None or there is None or here[0] not in houses or there[0] not in linter["root_packages"]:
                continue
            if here[0] == there[0] and here != there and {here[1], there[1]} <= houses[here[0]].words.keys():
                houses[here[0]].imports.add((here[1], there[1]))
            elif here[0] != there[0] and (there[0] not in houses or there[1] in houses[there[0]].words):
                between[here[0], there[0]].add((here[1], there[1]))
    return list(houses.values()), dict(between)


def essential(imports: set[Edge]) -> list[Edge]:
    """The imports that do not follow from others: the transitive reduction of a graph without circles."""
    below: dict[str, set[str]] = defaultdict(set)
    for above, room in imports:
        below[above].add(room)

    def reach(room: str, seen: set[str]) -> set[str]:
        for other in below[room] - seen:
            seen.add(other)
            reach(other, seen)
        return seen

    return sorted((a, b) for a, b in imports if not any(b in reach(other, set()) for other in below[a] - {b}))


# Layout: on each floor that an arrow passes it gets a slot, shared by all arrows to the same room, so that arrows run
# between rooms and never behind one. Slots and rooms of a floor stand in the order of what they are joined to.

ROOM_HEIGHT, FLOOR_HEIGHT, LANE, GAP = 54, 92, 10, 14


@dataclass
class Place:
    x: float
    y: float
    width: float
    height: float

    @property
    def top(self) -> Point:
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        return self.x + self.width / 2, self.y + self.height


def lay_out(house: House, width: float, room_width: float) -> tuple[dict[Spot, Place], list[Piece]]:
    """Where the rooms and the slots are, and the pieces of the arrows."""
    level = house.floor_of()
    rows: list[list[Spot]] = [list(floor) for floor in house.floors]
    pieces: set[Piece] = set()
    for above, below in essential(house.imports):
        slots: list[Slot] = [(below, floor) for floor in range(level[above] + 1, level[below])]
        for slot in slots:
            if slot not in rows[slot[1]]:
                rows[slot[1]].append(slot)
        chain: list[Spot] = [above, *slots, below]
        pieces |= {(a, b, b == below) for a, b in pairwise(chain)}
    links: dict[Spot, list[Spot]] = defaultdict(list)
    for a, b, _ in sorted(pieces, key=str):
        links[a].append(b)
        links[b].append(a)
    places: dict[Spot, Place] = {}

    def place(number: int, row: list[Spot]) -> None:
        widths = [room_width if isinstance(item, str) else LANE for item in row]
        gap = min(40.0, (width - sum(widths)) / (len(row) + 1))
        x = (width - sum(widths) - gap * (len(row) - 1)) / 2
        for item, wide in zip(row, widths):
            places[item] = Place(x, number * FLOOR_HEIGHT, wide, ROOM_HEIGHT)
            x += wide + gap

    for number, row in enumerate(rows):
        place(number, row)
    for sweep in range(24):
        order = range(len(rows)) if sweep % 2 == 0 else reversed(range(len(rows)))
        for number in order:
            near = {number - 1} if sweep % 2 == 0 else {number + 1}
            if sweep > 15:
                near = {number - 1, number + 1}

            def want(item: Spot, near: set[int] = near) -> tuple[float, str]:
                xs = [places[o].top[0] for o in links[item] if round(places[o].y / FLOOR_HEIGHT) in near]
                return (sum(xs) / len(xs) if xs else places[item].top[0], str(item))

            rows[number].sort(key=want)
            place(number, rows[number])
    return places, sorted(pieces, key=str)


def curve(start: Point, end: Point) -> str:
    (x0, y0), (x1, y1) = start, end
    bend = (y1 - y0) * 0.5
    return f"M{x0:.0f} {y0:.0f}C{x0:.0f} {y0 + bend:.0f} {x1:.0f} {y1 - bend:.0f} {x1:.0f} {y1:.0f}"


def spread(pieces: list[Piece], places: dict[Spot, Place]) -> dict[tuple[Spot, Spot], tuple[Point, Point]]:
    """Where each piece leaves and arrives: side by side along the edge of a room, in the order of the other ends."""
    ends: dict[tuple[Spot, Spot], list[Point]] = {}
    for index, edge in ((0, "bottom"), (1, "top")):
        groups: dict[Spot, list[tuple[Spot, Spot]]] = defaultdict(list)
        for a, b, _ in pieces:
            groups[(a, b)[index]].append((a, b))
        for item, group in groups.items():
            group.sort(key=lambda pair: (places[pair[1 - index]].top[0], str(pair)))
            x, y = getattr(places[item], edge)
            step = min(22.0, places[item].width * 0.7 / len(group)) if isinstance(item, str) else 0.0
            for number, pair in enumerate(group):
                ends.setdefault(pair, []).append((x + step * (number - (len(group) - 1) / 2), y))
    return {pair: (points[0], points[1]) for pair, points in ends.items()}


def two_lines(text: str, width: int) -> list[str]:
    """The text in at most two lines, cut at a comma or colon where it is longer."""
    while len(lines := textwrap.wrap(text, width)) > 2:
        at = max(text.rfind(mark) for mark in (", ", ": "))
        if at < 0:
            return lines[:2]
        text = text[:at]
    return lines


def draw(house: House, x: float, y: float, width: float, room_width: float) -> tuple[list[str], float]:
    """The house at (x, y) as SVG lines, and its height."""
    height = 56 + (len(house.floors) - 1) * FLOOR_HEIGHT + ROOM_HEIGHT + 20
    lines = [
        f'<rect class="house" x="{x}" y="{y}" width="{width}" height="{height}" rx="10"/>',
        f'<text class="roof" x="{x + 16}" y="{y + 30}">{house.name}/</text>',
    ]
    places, pieces = lay_out(house, width - 2 * GAP, room_width)
    left, top = x + GAP, y + 56
    for number in range(1, len(house.floors)):
        line = top + number * FLOOR_HEIGHT - (FLOOR_HEIGHT - ROOM_HEIGHT) / 2
        lines.append(f'<path class="floor" d="M{x + 1:.0f} {line:.0f}H{x + width - 1:.0f}"/>')
    ends = spread(pieces, places)
    for a, b, last in pieces:
        (x0, y0), (x1, y1) = ends[a, b]
        tip = ' marker-end="url(#tip)"' if last else ""
        start, end = (left + x0, top + y0), (left + x1, top + y1 - (2 if last else 0))
        through = f"V{top + y1 + ROOM_HEIGHT:.0f}" if not last else ""
        lines.append(f'<path class="arrow" d="{curve(start, end)}{through}"{tip}/>')
    for floor in house.floors:
        for room in floor:
            spot = places[room]
            below = sorted(b for a, b in house.imports if a == room)
            lines += [
                f"<g><title>{house.name}/{room}</title>",
                f"<desc>imports {', '.join(below) or 'nothing of this house'}</desc>",
                f'<rect class="room" x="{left + spot.x:.0f}" y="{top + spot.y:.0f}" width="{spot.width:.0f}" '
                f'height="{spot.height}" rx="7"/>',
                f'<text class="name" x="{left + spot.x + 10:.0f}" y="{top + spot.y + 18:.0f}">{room}</text>',
            ]
            for number, text in enumerate(two_lines(house.words[room], int((room_width - 18) / 5.7))):
                at = f'x="{left + spot.x + 10:.0f}" y="{top + spot.y + 33 + 13 * number:.0f}"'
                lines.append(f'<text class="word" {at}>{escape(text)}</text>')
            lines.append("</g>")
    return lines, height


def picture(root: Path) -> str:
    """The whole SVG: the panel and the way to the host side by side, the engine below, the presets under it."""
    houses, between = read_houses(root)
    by_name = {house.name: house for house in houses}
    tui, tui_height = draw(by_name["tui"], 20, 20, 480, 212)
    remote, remote_height = draw(by_name["remote"], 540, 20, 480, 212)
    engine_top = 20 + max(tui_height, remote_height) + 70
    engine, engine_height = draw(by_name["surgvqa"], 20, engine_top, 1000, 300)
    presets_top = engine_top + engine_height + 50
    height = presets_top + 60
    presets = first_sentence(root / "presets" / "__init__.py").removeprefix("Presets: ")

    def rooms(above: str, below: str) -> str:
        return ", ".join(sorted({room for _, room in between.get((above, below), set())}))

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1040 {height:.0f}" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif\">",
        "<!-- Drawn by docs/house.py from the imports; `make house` renews it. -->",
        "<title>The rooms of the house: imports point down only</title>",
        f"<style>{STYLE}@media (prefers-color-scheme: dark) {{{DARK}}}\n</style>",
        "<defs>",
        *(
            f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6" orient="auto">'
            f'<path class="{name}" d="M0 0 10 5 0 10z"/></marker>'
            for name in ("tip", "far")
        ),
        "</defs>",
        f'<rect class="ground" width="1040" height="{height:.0f}" rx="12"/>',
        *tui,
        *remote,
        *engine,
        '<path class="between" d="M500 48H538" marker-end="url(#far)"/>',
    ]
    for x, above, top in ((260, "tui", 20 + tui_height), (780, "remote", 20 + remote_height)):
        lines.append(f'<path class="between" d="M{x} {top:.0f}V{engine_top - 2:.0f}" marker-end="url(#far)"/>')
        for number, text in enumerate(textwrap.wrap("uses " + rooms(above, "surgvqa"), 34)):
            lines.append(f'<text class="note" x="{x + 12}" y="{engine_top - 52 + 14 * number:.0f}">{text}</text>')
    users = ", ".join(sorted({room for room, _ in between.get(("surgvqa", "presets"), set())})) or "the engine"
    lines += [
        f'<path class="between" d="M520 {presets_top - 50:.0f}V{presets_top - 2:.0f}" marker-end="url(#far)"/>',
        f'<text class="note" x="532" y="{presets_top - 20:.0f}">used by {users}</text>',
        f'<rect class="house" x="20" y="{presets_top:.0f}" width="1000" height="40" rx="10"/>',
        f'<text class="roof" x="36" y="{presets_top + 26:.0f}">presets/</text>',
        f'<text class="word" x="120" y="{presets_top + 25:.0f}">{escape(presets)}</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the picture is not current")
    options = parser.parse_args()
    current = picture(ROOT)
    if not options.check:
        OUT.write_text(current, encoding="utf-8")
    elif not OUT.exists() or OUT.read_text(encoding="utf-8") != current:
        print("docs/house.svg is not what the imports are now; run: make house", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
