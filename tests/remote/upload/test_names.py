"""Names of files and paths, from here to the host."""

from __future__ import annotations

import json
import sys
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sender import wire
from shards import tree
from sshd import Relay, cmdline, laptop  # noqa: F401

from remote.upload.hashes import Hashes, Item
from surgvqa.errors import SurgvqaError

pytestmark = pytest.mark.slow

NASTY = ["a b", "it's", 'say "x"', "$(touch pwned)", "`id`", "-rf", "--", "new\nline", "tab\t", "*", "~", "#", "ä€",
         ";", "\\", "!x", "%s", "{a,b}", "|", "a&b", " lead", "\x7f", "\x01"]  # fmt: skip
names = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="/\0"), min_size=1, max_size=30),
).filter(lambda n: n not in (".", "..") and len(n.encode()) < 200)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    found=st.lists(names, min_size=1, max_size=8, unique=True),
    words=st.lists(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20)),
)
@example(found=NASTY, words=NASTY)
def test_nasty_names_reach_the_host_as_they_are(sender, laptop, found, words):  # noqa: F811
    folder = laptop.root / f"names{time.monotonic_ns()}"
    folder.mkdir()
    for name in found:
        (folder / name).write_bytes(name.encode())
    sources = [(folder / name, f"{folder.name}/{name}/{name}") for name in found]
    sender.send(Item(f"names {found[0]}", "files", Hashes().entries(sources)))
    assert tree(laptop.there / folder.name) == {f"{n}/{n}": n.encode() for n in found}
    echo = [sys.executable, "-c", "import sys, json; print(json.dumps(sys.argv[1:]))", *words]
    lines = [m["line"] for m in sender.remote.stream("execute", argv=echo) if "line" in m]
    assert json.loads(lines[0]) == words
    assert not list(laptop.root.rglob("pwned"))


def test_paths_stay_inside_the_workspace(sender, laptop):  # noqa: F811
    file = laptop.workspace / "x"
    file.write_text("x")
    (laptop.there).mkdir(exist_ok=True)
    (laptop.there / "out").symlink_to(laptop.root)
    entries = Hashes().entries([(file, "x")])
    for bad in ("../x", "/etc/x", "a/../../x", "", "a//b", "out/x"):
        item = {
            **wire(Item("n", "files", entries)),
            "files": [[bad, *wire(Item("n", "files", entries))["files"][0][1:]]],
        }
        with pytest.raises(SurgvqaError, match=r"inside the workspace|leaves the workspace"):
            sender.remote.ask("begin", item=item)
    for bad in ("../../x", "a/b", ""):
        with pytest.raises(SurgvqaError):
            sender.remote.ask("begin", item={**wire(Item("n", "files", entries)), "digest": bad})
