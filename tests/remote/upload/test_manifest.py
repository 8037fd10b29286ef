"""The manifest on its way: only what the host lacks of it is sent."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from remote.agent import disk, manifest, staging, standing
from remote.agent import main as agent
from remote.upload.hashes import Entry, Item
from remote.upload.offers import ask_of, ask_of_all
from surgvqa.errors import SurgvqaError, UsageError


def item(count: int = 300, changed: int | None = None) -> Item:
    """A set of files, one of which may have other content."""
    entries = [
        Entry(
            Path(f"v{i}.jpg"), f"frames/v{i}.jpg", 5, hashlib.sha256(b"%d" % (-1 if i == changed else i)).hexdigest(), i
        )
        for i in range(count)
    ]
    return Item("data", "files", tuple(entries))


class Host:
    """The agent as the laptop asks it, with every message as it would be sent."""

    host = SimpleNamespace(name="gpuhost")

    def __init__(self, workspace: Path, monkeypatch):
        self.workspace, self.sent, self.said = workspace, [], []
        monkeypatch.setattr(standing, "_received", {})

    def ask(self, op: str, **params):
        self.sent.append(len(json.dumps(params)))
        self.said.clear()
        channel = SimpleNamespace(say=self.said.append)
        agent._answer(channel, json.loads(json.dumps({"op": op, "workspace": str(self.workspace), **params})))
        answer = json.loads(json.dumps(self.said[-1]))
        if "error" in answer:
            raise SurgvqaError(answer["error"])
        return answer["done"]


def publish(workspace: Path, one: Item) -> None:
    """As if it had been uploaded, without the files themselves."""
    files = {row[0]: [row[1], row[2], row[3], row[4]] for row in one.rows}
    standing.write_record(
        str(workspace), "data", {"kind": "files", "digest": one.digest, "state": "ready", "files": files}
    )


def test_rows_come_back_as_they_were_packed():
    rows = [*item(7).rows, ["\udcff ü\n\u2028", 0, "0" * 64, -1, 0o600]]
    assert manifest.unpack(manifest.pack(rows)) == rows and manifest.unpack(manifest.pack([])) == []
    for broken in ("", "x", "AAAA 1", manifest.pack(rows)[:-1] + "9"):
        with pytest.raises(ValueError):
            manifest.unpack(broken)


def test_one_changed_file_costs_one_bucket(tmp_path, monkeypatch):
    host = Host(tmp_path, monkeypatch)
    ask_of_all(host, "known", [item()])
    whole = host.sent[-1]
    publish(tmp_path, item())
    host = Host(tmp_path, monkeypatch)
    ask_of_all(host, "known", [item(changed=9)])
    assert len(host.sent) == 3 and host.sent[-1] < whole / 5
    ask_of(host, "retire", item(changed=9), everything=False)
    assert len(host.sent) == 4, "it is known by now"


def test_what_was_published_is_asked_for_by_its_digest_alone(tmp_path, monkeypatch):
    one = item(1)
    place = tmp_path / "frames" / "v0.jpg"
    place.parent.mkdir()
    place.write_bytes(b"12345")
    publish(tmp_path, Item("data", "files", (one.entries[0]._replace(mtime_ns=place.stat().st_mtime_ns),)))
    host = Host(tmp_path, monkeypatch)
    assert ask_of_all(host, "known", [one])["items"][0]["published"] and host.sent[0] < 200
    place.write_bytes(b"1234")
    assert ask_of_all(host, "known", [one])["items"][0]["state"] != "complete"


def test_a_manifest_that_arrives_damaged_is_refused(tmp_path, monkeypatch):
    host, one = Host(tmp_path, monkeypatch), item(3)
    for rows in (manifest.pack(item(3, changed=1).rows), "nonsense"):
        with pytest.raises(SurgvqaError, match="arrived damaged"):
            host.ask("begin", item={**one.offer, "buckets": one.buckets, "rows": rows})


@pytest.mark.parametrize("want", [5, ["x"], {"other": [1]}, {}, {"DIGEST": [[], "x", -1, 1 << 70]}, {"DIGEST": 3}])
def test_a_host_that_never_has_enough_is_refused(want):
    one = item(3)
    if isinstance(want, dict):
        want = {one.digest if digest == "DIGEST" else digest: buckets for digest, buckets in want.items()}
    host = SimpleNamespace(host=SimpleNamespace(name="h"), ask=lambda op, **params: {"want": want})
    with pytest.raises(SurgvqaError, match="wants the list"):
        ask_of(host, "begin", one)


def test_a_name_is_a_file_or_a_folder_and_not_both():
    entries = [Entry(path, path, 1, "0" * 64, 1) for path in ("a", "a.jpg", "a/b/c")]
    with pytest.raises(UsageError, match="a would be a file and a folder"):
        Item("data", "files", tuple(entries))


def test_the_staging_folder_of_an_older_content_is_removed_and_its_whole_files_are_kept(tmp_path):
    older, newer = item(3), item(3, changed=1)
    content = {entry.path: b"%d" % i for i, entry in enumerate(older.entries)}
    wire = [{**one.offer, "files": [[row[0], 1, *row[2:]] for row in one.rows]} for one in (older, newer)]
    staging.begin(None, str(tmp_path), wire[0])
    old = staging.staging_of(str(tmp_path), older.digest)
    for index, (path, data) in enumerate(content.items()):
        staged = Path(staging.staged(old, path))
        staged.parent.mkdir(exist_ok=True)
        staged.write_bytes(data)
        staging.note(old, [(index, 0, 1)])
    answer = staging.begin(None, str(tmp_path), wire[1])
    assert answer["whole"] == [0, 2] and answer["removed"] > 0 and not Path(old).exists()


@pytest.mark.parametrize(
    "content",
    ["[" * 200_000, "[1]", "{}", '{"name": 5, "kind": "folder", "digest": "a", "files": []}',
     '{"name": "m", "kind": [1], "digest": "a", "files": []}', '{"name": "m", "kind": "folder", "digest": "a"}',
     '{"name": "m", "kind": "folder", "digest": "a", "files": [["p", "5", "h", 1, 1]]}', None],
)  # fmt: skip
def test_a_damaged_manifest_of_a_broken_off_upload_is_none(tmp_path, content):
    """None: a FIFO, which keeps its reader waiting."""
    from remote.agent import standing

    folder = tmp_path / ".surgvqa/staging/a"
    folder.mkdir(parents=True)
    if content is None:
        os.mkfifo(folder / "manifest.json")
    else:
        (folder / "manifest.json").write_text(content)
    assert standing.staged_item(str(tmp_path), "a") is None


@pytest.mark.parametrize("where", ["ready/m.json", "staging/abc/manifest.json"])
@pytest.mark.parametrize("field", ["name", "path"])
def test_a_record_of_a_name_that_no_file_can_have_takes_nothing_else_down(tmp_path, where, field):
    """Half of a surrogate pair, as JSON may hold it."""
    name, path = ("\ud800", "a") if field == "name" else ("m", "\ud800")
    item = {"name": name, "kind": "folder", "digest": "abc", "files": [[path, 1, "f" * 64, 1, 0o644]]}
    record = {**item, "state": "ready", "files": {path: [1, "f" * 64, 1, 0o644]}}
    file = tmp_path / ".surgvqa" / where
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(record if "ready" in where else item))
    asked = {"name": "m", "kind": "folder", "digest": "abc", "files": [["a", 1, "f" * 64, 1, 0o644]]}
    assert standing.known(None, str(tmp_path), [asked])["items"][0]["state"] == "absent"
    assert staging.begin(None, str(tmp_path), asked)["whole"] == []
    assert len(disk.abandoned(None, str(tmp_path), [])["uploads"]) == 1
    assert disk.disk(SimpleNamespace(say=lambda message: None), str(tmp_path), "venv")["complete"]
