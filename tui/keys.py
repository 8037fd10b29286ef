"""The one table of keys: bindings, footer, help, palette and docs are made from it.

A key is remapped in ~/.config/surgvqa/keys.toml, by its place and name:

    [monitor]
    stop = "ctrl+s"

No default needs more than what tmux and GNU screen pass on: letters, digits, arrows, Enter, Esc, F-keys.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from textual.binding import Binding, BindingType

from surgvqa.errors import UsageError
from surgvqa.files import read_text, user_folder


@dataclass(frozen=True)
class Key:
    """One thing that a key does, at one place."""

    name: str
    keys: str
    """As Textual names them, comma-separated."""
    action: str
    label: str
    """In the footer and the palette."""
    about: str = ""
    """In the help; '' says no more than the label."""
    footer: bool = True
    priority: bool = False
    """Whether it works before the widget with the focus sees the key."""
    shown: str = ""
    """How the keys are written, where their names would say too little."""


PRESET_KEYS = tuple(f"f{number}" for number in range(5, 13))

PANEL = (
    *(
        Key(mode, str(number), f"go('{mode}')", mode.capitalize(), f"Go to {mode.capitalize()}", footer=False)
        for number, mode in enumerate(("merge", "upload", "train", "monitor", "ask"), 1)
    ),
    Key("hosts", "h", "hosts", "host", "Choose where work is done: this machine or a GPU host"),
    Key("help", "question_mark", "help", "help", "All keys of this screen", shown="?"),
    Key("commands", "ctrl+p", "command_palette", "commands", "Find a command by its name", footer=False),
    Key("quit", "q", "quit", "quit", "Close the panel; running jobs go on"),
    Key("quit_now", "ctrl+q", "quit", "quit", footer=False, priority=True),
)
SCREEN = (Key("set_up", "v", "set_up", "set up host", "Install this version of surgvqa on the host"),)
END_MACHINE = Key("end_machine", "x", "end_machine", "end machine", "Fetch what is on the rented machine, then end it")
MERGE = (
    Key("merge", "m", "merge", "merge", "Start the merge"),
    Key("plan", "p", "plan", "plan again", "A dry run: sizes, free disk, what would be merged"),
    Key("stop", "s", "stop", "stop", "End the merge; a later one goes on from there"),
    Key("audit", "a", "audit", "audit", "Read the dtype and shape of every tensor of the merged checkpoint"),
    Key("revert", "x", "revert", "reset", "Forget what was typed into the field"),
    Key("save", "w", "save_settings", "save", "Write what was typed here to surgvqa.toml"),
)
UPLOAD = (
    Key("upload", "u", "upload", "upload", "Send it by the marked way"),
    Key("other_way", "w", "other_way", "other way", "Mark another way than the cheapest"),
    Key("plan", "p", "plan", "plan again", "Read the files again"),
    Key("stop", "s", "stop", "stop", "End the upload; the next one goes on there"),
    END_MACHINE,
)
TRAIN = (
    Key("launch", "l", "launch", "launch", "Start training with these settings"),
    Key("apply", "enter", "apply", "apply", "Use the preset that is looked at", priority=True),
    Key("leave", "escape", "leave", "leave", "Leave the preset that is looked at", priority=True),
    Key("preset_1", PRESET_KEYS[0], "preview(0)", "presets", "What the preset would change", priority=True,
        shown="F5 …"),
    *(
        Key(f"preset_{i + 1}", key, f"preview({i})", f"preset {i + 1}", "What the preset would change", footer=False,
            priority=True, shown=key.upper())
        for i, key in enumerate(PRESET_KEYS)
        if i
    ),
    Key("search", "slash", "search", "find", "Find a setting by its name", shown="/", footer=False),
    Key("fold", "z", "fold", "fold", "Fold the group of settings, or unfold it", footer=False),
    Key("check", "d", "check_data", "check data", "Look at every sample, its frames and its sound", footer=False),
    Key("dry_run", "p", "dry_run", "dry run", "Ask the command what it would do, without starting it", footer=False),
    Key("copy", "y", "copy", "copy command", "Copy the command that would be started", footer=False),
    Key("save", "w", "save_settings", "save", "Write what was typed here, and the preset, to surgvqa.toml"),
    Key("revert", "x", "revert", "reset", "Forget what was typed into the field"),
)  # fmt: skip
MONITOR = (
    Key("stop", "s", "stop", "stop", "Save a checkpoint and end the run"),
    Key("resume", "c", "resume", "continue", "Go on from the last checkpoint of this run"),
    Key("way_on", "o", "way_on", "go on smaller", "Out of memory: go on from the last checkpoint as proposed"),
    Key("evaluate", "e", "evaluate", "evaluate", "Evaluate this run's adapter on the evaluation samples"),
    Key("attach", "a", "attach", "attach", "Follow the run chosen in the list"),
    Key("fetch", "f", "fetch", "fetch", "Bring the run's adapters, checkpoints and logs here, verified"),
    Key("compare", "d", "compare", "compare", "Curves, settings and scores of the marked runs"),
    Key("runs", "r", "runs", "runs", "To the run list"),
    END_MACHINE,
    Key("metric", "m", "metric", "next chart", "Another figure in the chart: loss, accuracy, memory, …", footer=False),
    Key("scale", "g", "log_scale", "scale", "A logarithmic or a linear axis", footer=False),
    Key("zoom_in", "plus,equals_sign", "zoom(0.5)", "zoom", "Zoom in and out (also the mouse wheel)", shown="+ −"),
    Key("zoom_out", "minus", "zoom(2.0)", "zoom", "Zoom in and out (also the mouse wheel)", footer=False, shown="+ −"),
    Key("cursor_back", "left", "cursor(-1)", "cursor", "Read exact values: the chart's cursor, a point back or on",
        footer=False, shown="← →"),
    Key("cursor_on", "right", "cursor(1)", "cursor", "Read exact values: the chart's cursor, a point back or on",
        footer=False, shown="← →"),
    Key("earlier", "comma,shift+left", "pan(-0.25)", "earlier", "Move the zoomed part", footer=False, shown=", ."),
    Key("later", "full_stop,shift+right", "pan(0.25)", "later", "Move the zoomed part", footer=False, shown=", ."),
    Key("whole", "0", "whole", "whole run", "The whole run again, without a cursor", footer=False),
    Key("timeline", "i", "timeline", "timeline", "To the timeline; Enter there opens an entry", footer=False),
    Key("level", "l", "level", "level", "Timeline: everything, events alone, or warnings and errors", footer=False),
    Key("wrap", "w", "wrap", "wrap", "Timeline: long lines wrapped or cut", footer=False),
    Key("follow_end", "t", "follow_end", "follow end", "Jump to the timeline's end and stay there"),
    Key("search", "slash", "search", "find", "Find text in the timeline", shown="/"),
    Key("next_match", "n", "search_again(-1)", "next match", "The next match further up", footer=False),
    Key("match_before", "N", "search_again(1)", "match before", "The match before, further down", footer=False),
    Key("copy", "y", "copy", "copy", "Copy the timeline's entry (through the terminal: OSC 52)", footer=False),
)  # fmt: skip
ASK = (
    Key("ask", "a", "ask", "ask", "Ask the model this sample's question"),
    Key("hear", "p", "hear", "hear", "Play the spoken question"),
    Key("unload", "x", "unload", "unload", "End the process that holds the model"),
)
RUN_LIST = (Key("mark", "space", "mark", "mark", "Mark the run for comparing, or not any more", footer=False),)
LIST = (
    Key("filter", "slash", "filter", "filter", "Show only the rows that hold what is typed; Esc shows all again",
        shown="/"),
    Key("sort", "z", "sort", "sort", "Sort the rows another way"),
)  # fmt: skip
TIMELINE = (
    Key(
        "open",
        "enter",
        "open",
        "open",
        "The whole entry and the output around it; the chart's cursor goes there",
    ),
    Key("up", "up,k", "move(-1)", "up", "Move through the timeline", footer=False, shown="↑ ↓"),
    Key("down", "down,j", "move(1)", "down", "Move through the timeline", footer=False, shown="↑ ↓"),
    Key("page_up", "pageup", "page(-1)", "page up", "A page up or down", footer=False, shown="PgUp PgDn"),
    Key("page_down", "pagedown", "page(1)", "page down", "A page up or down", footer=False, shown="PgUp PgDn"),
    Key("first", "home", "end(False)", "first", "The first or the last entry", footer=False, shown="Home End"),
    Key("last", "end", "end(True)", "last", "The first or the last entry", footer=False, shown="Home End"),
)
FIELD = (Key("edit", "enter", "edit", "edit", "Edit the setting"),)
FORM = (
    Key("up", "up,k", "move(-1)", "previous", "The setting before or after", footer=False, shown="↑ ↓"),
    Key("down", "down,j", "move(1)", "next", "The setting before or after", footer=False, shown="↑ ↓"),
)
EDITOR = (
    Key("save", "enter", "submit", "save", "Keep what was typed"),
    Key("complete", "tab", "complete", "complete", "Complete the path as it is shown"),
    Key("cancel", "escape", "leave", "cancel", "Drop what was typed"),
)
SEARCH = (
    Key("find", "enter", "submit", "find", "Go to what was typed"),
    Key("cancel", "escape", "leave", "cancel", "Close the search"),
)
COMPARE = (
    Key("metric", "m", "metric", "next chart", "Another figure in the chart"),
    Key("scale", "g", "log_scale", "scale", "A logarithmic or a linear axis"),
    Key("cursor_back", "left", "cursor(-1)", "cursor", "Read exact values", footer=False, shown="← →"),
    Key("cursor_on", "right", "cursor(1)", "cursor", "Read exact values", footer=False, shown="← →"),
    Key("all", "a", "all_settings", "all settings", "Also the settings that are the same"),
    Key("leave", "escape,d,q", "leave", "back", "Back to Monitor", shown="Esc"),
)
QUESTION = (
    Key("yes", "y,enter", "answer(True)", "yes", "Do it"),
    Key("no", "n,escape,q", "answer(False)", "leave it", "Leave everything as it is"),
)
HOST_KEY = (
    Key("accept", "y", "answer(True)", "it is the same: accept", "The key is the host's: remember it"),
    Key("refuse", "n,escape,q", "answer(False)", "refuse", "Do not connect"),
)
HOST_LIST = (Key("leave", "escape,h,q", "leave", "leaves it", "Leave the host as it is"),)
OFFERS = (
    Key("alone", "m", "alone", "the machine alone", "Rent the machine and start nothing on it"),
    Key("leave", "escape,q", "leave", "none", "Rent nothing"),
)
FIRST_RUN = (Key("leave", "escape,q", "leave", "looks around first", "Go to the panel without choosing"),)
HELP = (Key("close", "escape,question_mark,q,enter", "dismiss", "closes", "Close the help"),)
ENTRY = (Key("close", "escape,enter,q", "dismiss", "closes", "Close the entry"),)
TABLE = {
    "panel": PANEL, "screen": SCREEN, "merge": MERGE, "upload": UPLOAD, "train": TRAIN, "monitor": MONITOR,
    "ask": ASK,
    "list": LIST, "run_list": RUN_LIST, "timeline": TIMELINE, "field": FIELD, "form": FORM, "editor": EDITOR,
    "search": SEARCH,
    "compare": COMPARE, "question": QUESTION, "host_list": HOST_LIST, "host_key": HOST_KEY, "offers": OFFERS,
    "first_run": FIRST_RUN, "help": HELP, "entry": ENTRY,
}  # fmt: skip
PLACES = {
    "panel": "Everywhere", "screen": "Every screen, with a host", "merge": "Merge", "upload": "Upload",
    "train": "Train", "monitor": "Monitor", "ask": "Ask", "list": "Every list and table",
    "run_list": "The run list", "timeline": "The timeline",
    "field": "A setting", "form": "A list of settings", "editor": "A setting that is being edited",
    "search": "A search", "compare": "Comparing runs", "question": "A question", "host_list": "The list of hosts",
    "host_key": "An unknown host key", "offers": "Machines to rent", "first_run": "The first run", "help": "The help",
    "entry": "An entry of the timeline",
}  # fmt: skip
"""What the docs call each place."""


def bindings(place: str) -> list[BindingType]:
    """The keys of one place, for a `BINDINGS`."""
    return [
        Binding(
            key.keys,
            key.action,
            key.label,
            show=key.footer,
            key_display=key.shown or None,
            priority=key.priority,
            tooltip=key.about,
            id=f"{place}.{key.name}",
        )
        for key in TABLE[place]
    ]


def keys_file() -> Path:
    """Where remapped keys stand."""
    return user_folder("config") / "keys.toml"


def read_keymap(file: Path) -> dict[str, str]:
    """The remapped keys by their id (`monitor.stop`); {} without a file. Raises UsageError that names the key."""
    if not file.is_file():
        return {}
    try:
        document = tomllib.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: not valid TOML: {error}") from None
    known = {f"{place}.{key.name}": key for place, keys in TABLE.items() for key in keys}
    remapped: dict[str, str] = {}
    for place, table in document.items():
        if not isinstance(table, dict):
            raise UsageError(f"{file}: {place} is {table!r}, expected a table: [{place}]")
        for name, keys in table.items():
            if f"{place}.{name}" not in known:
                near = get_close_matches(f"{place}.{name}", known, 1)
                raise UsageError(f"{file}: no key [{place}] {name}" + (f"; did you mean {near[0]}?" if near else ""))
            if not isinstance(keys, str) or not keys.strip() or any(not part.strip() for part in keys.split(",")):
                raise UsageError(f'{file}: [{place}] {name} is {keys!r}, expected keys such as "ctrl+s" or "x,f2"')
            remapped[f"{place}.{name}"] = ",".join(part.strip() for part in keys.split(","))
    taken: dict[str, str] = {}
    for id, key in known.items():
        place = id.partition(".")[0]
        for one in remapped.get(id, key.keys).split(","):
            first = taken.setdefault(f"{place} {one}", id)
            if id in remapped or first in remapped:
                for other in (first, taken.get(f"panel {one}", id)):
                    if known[other].action != key.action:
                        raise UsageError(f"{file}: {one} is the key of {other} and of {id}")
    return remapped


def markdown() -> str:
    """The table as Markdown, for the docs."""
    parts = []
    for place, title in PLACES.items():
        rows = dict.fromkeys((written(key), key.about or key.label, f"{place}.{key.name}") for key in TABLE[place])
        lines = [f"| `{keys}` | {about} | `{id}` |" for keys, about, id in rows]
        parts.append(
            f"## {title}\n\n| key | what it does | name in keys.toml |\n| --- | --- | --- |\n" + "\n".join(lines)
        )
    return "\n\n".join(parts) + "\n"


SIGNS = {
    "question_mark": "?", "slash": "/", "plus": "+", "minus": "−", "equals_sign": "=", "comma": ",", "full_stop": ".",
    "left": "←", "right": "→", "up": "↑", "down": "↓", "escape": "Esc", "enter": "Enter", "space": "Space",
    "tab": "Tab", "pageup": "PgUp", "pagedown": "PgDn", "home": "Home", "end": "End",
}  # fmt: skip


def written(key: Key) -> str:
    """The keys as they stand on a keyboard."""
    return " ".join(map(sign, key.keys.split(",")))


def sign(key: str) -> str:
    """One key by Textual's name, as it stands on a keyboard."""
    *held, last = key.split("+")
    name = SIGNS.get(last, last.upper() if last.startswith("f") and last[1:].isdigit() else last)
    return "+".join([*(word.capitalize() for word in held), name])
