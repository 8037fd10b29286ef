"""A host that answers with malice: nothing outside a run's folder is touched, nothing that a terminal obeys is shown,
and whatever it says is one line."""

import contextlib
import json
import os
import shutil
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from sshd import laptop  # noqa: F401

from remote.jobs import fetch, run_events
from remote.ssh.replies import Replies
from surgvqa.errors import SurgvqaError

RUN = 'def runs(*_, **__): return {"id": "r1", "state": "finished", "run": {}, "exit": {}, "folders": FOLDERS}\n'
ONE_FILE = 'def listing(*_, **__): return {"files": [["a", 5, 1]]}\n'


@pytest.fixture
def hostile(laptop):  # noqa: F811
    """Makes the host answer as a scenario has it: Python that names operations of the agent."""
    python = laptop.server.root / "python3"
    shutil.copy(ROOT / "tests/kits/evil_python.py", python)
    python.write_text(python.read_text().replace("#!/usr/bin/env -S python3", f"#!{sys.executable}"))
    python.chmod(0o755)
    laptop.host(python=str(python))

    def scenario(text: str, folders: list | None = None) -> None:
        names = "{k: v for k, v in list(globals().items()) if k in agent.OPERATIONS and k != 'agent'}"
        text = "import json, time, hashlib\n" + text.replace("FOLDERS", json.dumps(folders or ["runs/r1"]))
        answer = f"agent.operation = lambda name, own={names}: own.get(name) or known(name)"
        (python.parent / "scenario.py").write_text(f"{text}\n{answer}\n")

    return scenario


def refused(laptop, *words):  # noqa: F811
    """The one line of a command that fails."""
    done = laptop.command(*words, check=1)
    assert done.stderr.strip().count("\n") == 0 or "fetch" in words, done.stderr
    shown = done.stdout + done.stderr
    assert "Traceback" not in shown and not any(ord(c) < 32 and c not in "\n" for c in shown), shown
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["/OUT", "runs/../../OUT", "runs/..", "..", "runs/a/../../../x", ""])
def test_a_folder_outside_is_refused(laptop, hostile, tmp_path, folder):  # noqa: F811
    outside = tmp_path / "outside"
    outside.mkdir()
    hostile(
        RUN + 'def listing(*_, **__): return {"files": [["authorized_keys", 5, 1]]}\n'
        "def send(channel, workspace, folder, wanted):\n"
        '    channel.say({"path": "authorized_keys", "offset": 0, "size": 5}); channel.write(b"12345")\n'
        '    channel.say({"path": "authorized_keys", "sha256": hashlib.sha256(b"12345").hexdigest()}); return {}\n',
        [folder.replace("/OUT", str(outside))],
    )
    refused(laptop, "fetch", "gpuhost", "r1")
    assert not list(outside.iterdir())
    assert not [p for p in tmp_path.rglob("authorized_keys") if p != laptop.server.root / "authorized_keys"]


@pytest.mark.slow
def test_an_absolute_path_behind_runs_stays_below_runs(laptop, hostile, tmp_path):  # noqa: F811
    outside = tmp_path / "outside"
    outside.mkdir()
    hostile(
        f'{RUN}def listing(*_, **__): return {{"files": []}}\ndef send(*_, **__): return {{}}\n', [f"runs/{outside}"]
    )
    found = laptop.json("fetch", "gpuhost", "r1")
    assert Path(found["folder"]).resolve().is_relative_to((laptop.workspace / "runs").resolve())


@pytest.mark.slow
@pytest.mark.parametrize(
    "send",
    [
        '{"path": "a", "offset": 0, "size": 1 << 50}',
        '{"path": "a", "offset": 1 << 34, "size": 1 << 35}',
        '{"path": "a", "offset": -5, "size": 5}',
        '{"path": "a", "offset": 0, "size": "5"}',
        '{"path": "../b", "offset": 0, "size": 5}',
        '{"path": TARGET, "gone": True}',
        '{"path": ["a"], "gone": True}',
        '{"path": "b", "gone": True}',
        "[1, 2]",
    ],
)
def test_what_was_not_asked_for_is_refused(laptop, hostile, tmp_path, send):  # noqa: F811
    kept = tmp_path / "kept"
    kept.write_text("mine")
    hostile(
        f"TARGET = {str(kept)!r}\n{RUN}{ONE_FILE}"
        f"def send(channel, *_, **__):\n    channel.say({send})\n    channel.write(bytes(1 << 20)); return {{}}\n"
    )
    assert "cannot understand its answer" in refused(laptop, "fetch", "gpuhost", "r1")
    assert kept.read_text() == "mine"
    sizes = [path.stat().st_size for path in (laptop.workspace / "runs").rglob("*") if path.is_file()]
    assert sum(sizes) <= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        'channel.write(b"{not json\\n"); return {}',
        'channel.write(b"[1,2]\\n"); return {}',
        'channel.write(b"[" * 200000 + b"\\n"); return {}',
        'channel.write(b"\\xff\\xfe\\n"); return {}',
        'channel.say({"done": [1]}); return {}',
        'return {"runs": 5}',
        'return {"id": "r1", "folders": "runs"}',
        'return {"id": "r1", "folders": [5], "state": "finished", "run": []}',
        'channel.say({"error": "\\x1b]0;TITLE\\x07\\x1b[2J\\r\\nsurgvqa-remote: all fine"}); return {}',
    ],
)
def test_an_answer_of_any_shape_is_one_line(laptop, hostile, answer):  # noqa: F811
    follow = f"def follow(channel, *_, **__):\n    {answer}\n"
    hostile(f"def runs(channel, *_, **__):\n    {answer}\n{follow}")
    for words in (["runs", "gpuhost"], ["fetch", "gpuhost", "r1"], ["follow", "gpuhost", "r1"]):
        refused(laptop, *words)


@pytest.mark.slow
def test_escape_sequences_of_a_run_are_shown_as_text(laptop, hostile):  # noqa: F811
    evil = "\x1b]52;c;cm0gLXJmIH4=\x07"
    row = {
        "id": f"r1{evil}",
        "command": "train",
        "state": f"[red]{evil}",
        "started": 1.0,
        "steps": 1,
        "name": f"[b]{evil}",
        **dict.fromkeys(("host", "folder", "problem"), evil),
    }
    lines = "".join(
        json.dumps({"kind": kind, "t": 1.0, "name": evil, "text": evil}) + "\n"
        for kind in ("phase", "warning", "preset")
    )
    hostile(
        f"def runs(*_, **__): return {{'runs': [{row!r}], 'time': 2.0}}\n"
        "def follow(channel, *_, **__):\n"
        '    channel.say({"run": "r1", "state": "running"})\n'
        f'    channel.say({{"file": "events.jsonl", "at": 0, "text": {lines!r}}})\n'
        f'    channel.say({{"file": "log.txt", "at": 0, "text": {evil + "log"!r}}})\n'
        '    return {"run": "r1", "state": "finished", "finished": {}, "exit": {}}\n'
    )
    for words in (("runs", "gpuhost"), ("follow", "gpuhost", "r1", "--log")):
        done = laptop.command(*words)
        shown = done.stdout + done.stderr
        assert "\x1b" not in shown and "\x07" not in shown
        assert "[b]" in shown or words[0] == "follow", "brackets are text"


def test_a_symlink_that_lies_here_leads_nowhere(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "runs"
    outside.mkdir()
    root.mkdir()
    (root / "r1").symlink_to(outside)
    with pytest.raises(SurgvqaError, match="symlink"):
        fetch.landing(root, "r1/a")
    assert not list(outside.iterdir())


# --- random agents ---------------------------------------------------------------------------------------------------

HOST = SimpleNamespace(name="gpuhost", entry=SimpleNamespace(python="python3", login_timeout_s=5.0))
PATHS = st.sampled_from(["a", "b/c", "../x", "/etc/passwd", "", ".", "a/../../b", ".partial/a", "a\0", "é"])
SCALARS = st.none() | st.booleans() | st.integers(-3, 1 << 70) | st.floats() | st.text(max_size=5) | PATHS
JSON = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(PATHS, x, max_size=3), max_leaves=6)
KEYS = [
    "path",
    "offset",
    "size",
    "sha256",
    "gone",
    "done",
    "error",
    "beat",
    "file",
    "at",
    "text",
    "run",
    "state",
    "finished",
]
MESSAGE = st.dictionaries(st.sampled_from(KEYS), JSON | PATHS | st.integers(0, 9), max_size=6)
PIECE = st.binary(max_size=20) | (MESSAGE | JSON).map(lambda m: json.dumps(m).encode() + b"\n")


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECE, max_size=6))
def test_random_agents_write_nothing_but_what_was_asked_for(tmp_path_factory, pieces):
    root = tmp_path_factory.mktemp("fuzz")
    target = root / "runs" / "r1"
    target.mkdir(parents=True)
    asked = {p: fetch.Asked(fetch.Listed(p, 5, 1), 0) for p in ("a", "b/c")}
    stream = SimpleNamespace(readline=None, read1=None)
    data = BytesIO(Replies.MARK + b"".join(pieces))
    stream.readline, stream.read1 = data.readline, data.read1
    with contextlib.suppress(SurgvqaError, fetch._Broken):
        list(fetch._receive(SimpleNamespace(host=HOST), stream, target, asked))
    files = {str(p.relative_to(target)): p.stat().st_size for p in root.rglob("*") if p.is_file()}
    assert files.keys() <= {"a", "b/c", ".partial/a", ".partial/b/c"} and all(size <= 5 for size in files.values())


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_a_random_listing_is_bounded_or_refused(listed):
    try:
        files = fetch.wanted_files(HOST, listed, everything=True)
    except SurgvqaError as error:
        assert "\n" not in str(error)
        return
    assert all(
        not os.path.isabs(f.path) and ".." not in f.path.split("/") and 0 <= f.size <= fetch.MAX_FILE for f in files
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECE, max_size=6))
def test_a_random_stream_is_followed_or_refused_in_one_line(pieces):
    class Remote:
        host = HOST

        def stream(self, *_, **__):
            yield from Replies(HOST, iter([(Replies.MARK + b"".join(pieces), b"", None), (b"", b"", 0)]))

        def close(self):
            pass

    events = []
    try:
        for event in run_events.RunEvents(Remote(), "r1"):
            events.append(event)
            if event["kind"] == "connection":
                break
    except SurgvqaError as error:
        assert "\n" not in str(error)
    assert all(isinstance(event["kind"], str) for event in events)


# --- random answers to an upload and to every question ---------------------------------------------------------------

STAND = {"state": "absent", "have": [0], "foreign": ["a\nb"], "stale": ["old.jpg"], "stale_files": 1, "replaced": False}
GPU = {"index": 0, "name": "H100", "memory_used_bytes": 1, "memory_total_bytes": 2, "processes": [{"pid": 1}]}
ROW = {"name": "a", "kind": "run", "in_use": "", "note": "", "bytes": 1, "files": 1, "age_s": 1.5, "ours": True}
LISTED = dict.fromkeys(("id", "command", "state", "name", "host", "folder", "problem"), "x")
LISTED |= {"started": 1.0, "steps": 1}
GOOD = {
    "known": {"items": [STAND], "free": 10**12, "stagings": 0},
    "begin": {"complete": False, "whole": [0], "done": {"1": [[0, 5]]}, "free": 1, "removed": 0},
    "retire": {"removed": ["old.jpg"], "removed_files": 1, "changed": ["x"]},
    "abandoned": {"uploads": [{"name": "staging/ab", "bytes": 5, "note": "upload of x", "age_s": 1.0}]},
    "disk": {"workspace": "w", "free_bytes": 1, "total_bytes": 1, "more": 0, "complete": True, "entries": [ROW]},
    "gpus": {"gpus": [GPU]},
    "runs": {"runs": [LISTED], "time": 2.0},
    "listing": {"files": [["log.txt", 5, 1]]},
    "run": {
        "id": "r",
        "state": "died",
        "folders": ["runs/r"],
        "run": {"started": 1.0, "argv": ["train"], "options": {}},
    },
    "stop": {"run": "r", "state": "stopped", "before": "running", "seconds": 1.0},
}


@st.composite
def spoilt(draw):
    """An operation and a good answer to it of which one part, or several, are something else."""
    op = draw(st.sampled_from(sorted(GOOD)))
    answer = json.loads(json.dumps(GOOD[op]))
    for _ in range(draw(st.integers(1, 2))):
        at = answer
        while True:
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if not isinstance(at[key], (dict, list)) or not at[key] or draw(st.booleans()):
                break
            at = at[key]
        at[key] = draw(
            JSON | PATHS | st.text(max_size=8) | st.sampled_from(["a\nb", "\x1b[2J", -1, 1 << 70, "foreign"])
        )
    return op, answer


@settings(max_examples=200, deadline=None)
@given(spoilt())
def test_a_random_answer_to_an_upload_or_a_question_is_used_or_refused_in_one_line(case):
    from rich.console import Console

    from remote.cli import disk
    from remote.ssh.answers import checked
    from remote.upload import command, plan, send
    from remote.upload.hashes import Entry, Item
    from surgvqa.machine.gpus import draw as draw_gpus
    from surgvqa.terminal.drawing import console_on
    from tui.targets.link import Link

    op, answer = case
    item = Item("data", "files", tuple(Entry(f"/{p}", p, 5, "0" * 64, 1) for p in ("a", "b")))
    warnings, shown = [], open(os.devnull, "w")  # noqa: SIM115
    run = SimpleNamespace(warning=warnings.append)

    class Remote:
        host = HOST

        def ask(self, asked, **params):
            data = (
                Replies.MARK
                + json.dumps({"done": answer if asked == op or params.get("run") else GOOD[asked]}).encode()
                + b"\n"
            )
            found = list(Replies(HOST, iter([(data, b"", None), (b"", b"", 0)])))[-1]
            return checked(HOST, asked, params, found)

    try:
        if op == "known":
            plan.plan_table("h", plan.compare(Remote(), [], [item]))(Console(file=shown))
        elif op == "begin":
            send.held(Remote(), item, Remote().ask("begin"))
        elif op == "retire":
            command.retire(Remote(), [item], STAND, True, run)
        elif op == "abandoned":
            command.name_abandoned(Remote(), [], run)
        elif op == "disk":
            disk._show(console_on(shown), {**Remote().ask("disk"), "host": "h", "cleaned": []})
        elif op == "gpus":
            console_on(shown).print(draw_gpus(Remote().ask("gpus")["gpus"]))
        elif op == "run":
            info = Remote().ask("runs", run="r")["run"]
            assert (
                sum([info.get("started", 0.0), 1.0]) and [*info.get("argv", []), *info.get("options", {}).items()] != 0
            )
        elif op == "runs":
            link = Link.__new__(Link)
            link.host, link.ahead_s, link.listed = HOST, 0.5, None
            link._take_list([Remote().ask("runs")])
            assert all(run.id is not None for run in link.listed)
        elif op == "listing":
            assert all(size >= 0 for _, size, _ in Remote().ask("listing")["files"])
        else:
            Remote().ask(op)
    except SurgvqaError as error:
        assert "\n" not in str(error) and "\x1b" not in str(error)
    assert not any("\n" in warning or "\x1b" in warning for warning in warnings)
