"""How figures and states are written, the same on every screen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from textual.content import Content

from surgvqa.terminal.figures import amount, human_seconds

if TYPE_CHECKING:
    from tui.targets.connection_state import ConnectionState

GB = 1e9

STATE_STYLES = {
    "starting": "$secondary",
    "running": "bold $success",
    "silent": "bold $warning",
    "finished": "$primary",
    "failed": "$error",
    "died": "$error",
    "stopped": "$warning",
    "unknown": "$muted",
}
STATE_MARKS = {
    "starting": "◌",
    "running": "●",
    "silent": "◌",
    "finished": "✓",
    "failed": "✗",
    "died": "†",
    "stopped": "■",
    "unknown": "?",
}


def state(name: str) -> Content:
    """A run's state with its mark, coloured."""
    return Content.assemble((f"{STATE_MARKS.get(name, '?')} {name}", STATE_STYLES.get(name, "")))


CONNECTION_MARKS = {
    "connecting": ("◌", "$secondary"),
    "connected": ("●", "$success"),
    "unreachable": ("○", "bold $warning"),
    "unknown key": ("?", "bold $warning"),
    "refused": ("✗", "bold $error"),
}


def connection(name: str, connection: ConnectionState, width: int = 60) -> Content:
    """A host with its connection state: `gpuhost ● connected`, `gpuhost ○ unreachable since 12:04`."""
    mark, style = CONNECTION_MARKS[connection.kind]
    since = f" since {ago(connection.since)}" if connection.kind == "unreachable" else ""
    why = f": {connection.text.removeprefix(f'{name}: ')}" if connection.kind == "refused" else ""
    return Content.assemble(f"{name} ", (clip(f"{mark} {connection.kind}{since}{why}", width), style))


def gb(value: float | None, unit: bool = True) -> str:
    """Bytes as `19.8 GB`; below a tenth of a GB as MB."""
    if value is None:
        return "–"
    if value < GB / 10 and unit:
        return f"{value / 1e6:.0f} MB"
    return f"{value / GB:.1f}" + (" GB" if unit else "")


def size(value: float) -> str:
    """Bytes in the unit that fits: `812 MB`, `17.9 GB`."""
    return amount(value, "bytes")


def ago(then: float, now: float | None = None) -> str:
    """`12:04` today, else `Nov 21`."""
    now = now or time.time()
    local, today = time.localtime(then), time.localtime(now)
    same_day = (local.tm_year, local.tm_yday) == (today.tm_year, today.tm_yday)
    return time.strftime("%H:%M" if same_day else "%b %d", local)


def seconds(value: float | None) -> str:
    """`4 min 05 s`, or a dash when it is not known."""
    return "–" if value is None else human_seconds(value)


def price(value: float, per: str = "") -> str:
    """`$1.29`, `$1.29/h`: the providers' prices are in US dollars."""
    return f"${value:.2f}{per}"


def rate(value: float | None, unit: str) -> str:
    """`184 MB/s`, `2.31 samples/s`."""
    if value is None:
        return "–"
    if unit == "bytes":
        return f"{amount(value, unit)}/s"
    return f"{value:.3g} {unit}/s" if len(unit) <= 10 else f"{value:.3g}/s"


def short_path(path: object, root: Path | None = None) -> str:
    """A path as one would type it: relative to the workspace, or to home."""
    text = str(path)
    for base, prefix in ((root, ""), (Path.home(), "~/")):
        if base and Path(text).is_absolute() and Path(text).is_relative_to(base):
            return (prefix + str(Path(text).relative_to(base))).removesuffix("/.")
    return text


def value(thing: object, root: Path | None = None) -> str:
    """A setting's value as it is shown and edited."""
    if thing is None:
        return ""
    if isinstance(thing, bool):
        return "true" if thing else "false"
    if isinstance(thing, float):
        return f"{thing:g}"
    if isinstance(thing, list):
        return " ".join(value(item, root) for item in thing)
    return short_path(thing, root)


def bar(width: int, fraction: float, style: str, track: str = "$panel-lighten-1") -> Content:
    """A horizontal bar `width` cells long, filled to `fraction` (clipped to 0..1) in eighths of a cell."""
    eighths = round(max(0.0, min(1.0, fraction)) * width * 8)
    full, rest = divmod(eighths, 8)
    partial = " ▏▎▍▌▋▊▉"[rest] if full < width and rest else ""
    empty = width - full - len(partial)
    return Content.assemble(("█" * full, style), (partial, f"{style} on {track}"), (" " * empty, f"on {track}"))


def clip(text: str, width: int, keep_end: bool = False) -> str:
    """At most `width` characters; what is cut is shown by an ellipsis."""
    if len(text) <= width:
        return text
    if width <= 1:
        return "…"[:width]
    return "…" + text[1 - width :] if keep_end else text[: width - 1] + "…"
