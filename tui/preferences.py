"""What a user sets once for the panel, in ~/.config/surgvqa/panel.toml:

notify = "bell"                   # or "osc9" (a notice of the terminal's own), or "off"
title = true                      # the run in the terminal's title
webhook = "https://example.org/"  # gets {"text": …} by POST
money = 20.0                      # tells of a run that has cost so many dollars
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from surgvqa.errors import UsageError
from surgvqa.files import read_text, user_folder
from surgvqa.untrusted import one_line

NOTIFY = ("bell", "osc9", "off")
WEBHOOK_TIMEOUT_S = 10


@dataclass(frozen=True)
class Preferences:
    """The settings of panel.toml."""

    notify: str = "bell"
    title: bool = True
    webhook: str = ""
    money: float | None = None


def preferences_file() -> Path:
    """Where they stand."""
    return user_folder("config") / "panel.toml"


def read_preferences(file: Path) -> Preferences:
    """The preferences; the defaults without a file. Raises UsageError that names the key."""
    if not file.is_file():
        return Preferences()
    try:
        document = tomllib.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: not valid TOML: {error}") from None
    names = [field.name for field in fields(Preferences)]
    for key, value in document.items():
        if key not in names:
            near = get_close_matches(key, names, 1)
            raise UsageError(f"{file}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
        if key == "notify" and value not in NOTIFY:
            raise UsageError(f"{file}: notify is {value!r}, expected {', '.join(NOTIFY)}")
        if key == "title" and not isinstance(value, bool):
            raise UsageError(f"{file}: title is {value!r}, expected true or false")
        if key == "webhook" and not (
            isinstance(value, str) and (not value or value.startswith(("https://", "http://")))
        ):
            raise UsageError(f"{file}: webhook is {value!r}, expected an address that begins with https://")
        if key == "money" and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise UsageError(f"{file}: money is {value!r}, expected dollars above 0")
    return Preferences(**document)


def in_multiplexer() -> bool:
    """Whether tmux or GNU screen stands between: they pass on a bell, and no OSC 9."""
    return "TMUX" in os.environ or os.environ.get("TERM", "").startswith(("screen", "tmux"))


def notice(text: str) -> str:
    """A notice of the terminal's own: OSC 9, of iTerm2, WezTerm, kitty, Windows Terminal."""
    return f"\x1b]9;{one_line(text)}\x07"


def title(text: str) -> str:
    """The terminal's title: OSC 2."""
    return f"\x1b]2;{one_line(text)}\x07"


KEEP_TITLE, GIVE_TITLE_BACK = "\x1b[22;2t", "\x1b[23;2t"
"""xterm's stack of titles."""


def send(webhook: str, text: str) -> None:
    """POSTs {"text": …}; call it in a thread. Raises OSError."""
    import urllib.request  # here: few have a webhook, and the panel starts without it

    body = json.dumps({"text": one_line(text)}).encode()
    request = urllib.request.Request(webhook, body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=WEBHOOK_TIMEOUT_S).close()
