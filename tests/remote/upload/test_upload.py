"""Uploads to a real sshd: nothing lost, nothing half-done, nothing of anybody else's touched."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from places import ROOT
from sshd import Relay, cmdline, laptop  # noqa: F401
from waiting import until

from remote.agent import files as agent_files
from remote.agent import staging as staging_room
from remote.paths import remote_name
from remote.ssh.errors import ChangedHostKey
from remote.ssh.process import Reserve
from remote.upload import chunks, host_settings
from remote.upload import streams as transfer_room
from remote.upload.hashes import Hashes, Item
from remote.upload.plan import Way, cheapest, folder_sources
from remote.upload.send import send_item
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs.folder import Run
from surgvqa.runs.process import descendants

pytestmark = pytest.mark.slow

MB = 1_000_000


def checkpoint(folder: Path, shards: dict[str, int], seed: int = 0) -> Path:
    """A folder that looks like a checkpoint; sizes in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(seed)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "empty.txt").write_text("")
    for name, size in shards.items():
        (folder / name).write_bytes(noise.randbytes(size))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_the_hosts_settings_say_what_ours_say(tmp_path):
    """Values that are none, paths below runs/, which the host makes itself, and letters that TOML wants escaped."""
    from surgvqa.config.workspace import load_workspace

    (tmp_path / "surgvqa.toml").write_text(
        'host = "h"\nframes_dir = "/data/my frames"\neval_data_path = ""\n'
        '[train]\noutput_dir = "runs/first"\nsave_total_limit = "none"\nrun_name = "q\\"\\u007f \\\\ ü"\n'
        '[evaluate]\ncheckpoint = "runs/first"\n'
    )
    there = tmp_path / "there"
    there.mkdir()
    (there / "surgvqa.toml").write_text(host_settings.host_settings(load_workspace(tmp_path)))
    read = load_workspace(there)
    assert read.values == {"frames_dir": str(there / "my frames"), "eval_data_path": None}
    first = str(there / "runs" / "first")
    train = {"output_dir": first, "save_total_limit": None, "run_name": 'q"\x7f \\ ü'}
    assert read.by_command == {"train": train, "evaluate": {"checkpoint": first}}


def test_settings_that_the_host_cannot_have_are_found_before_anything_is_sent(laptop):  # noqa: F811
    checkpoint(laptop.workspace / "merged", {"model.safetensors": 1000})
    (laptop.workspace / "surgvqa.toml").write_text('model_name_or_path = "merged"\nframes_dir = "venv/frames"\n')
    said = laptop.command("upload", "gpuhost", check=2).stderr
    assert "cannot have the name 'venv/frames'" in said and not laptop.there.exists()


class Sender:
    """Sends folders over one connection, as `upload` does."""

    def __init__(self, laptop):  # noqa: F811
        self.laptop = laptop
        self.connect()
        self.facts = self.remote.ask("probe", venv="venv")
        self.run = Run.create(laptop.workspace / "runs", "upload")

    def connect(self) -> None:
        """By the ssh_config as it is now."""
        self.remote = self.laptop.connect()
        self.reserve = Reserve(self.remote.host, None)

    def item(self, folder: Path, name: str = "merged") -> Item:
        return Item(name, "folder", Hashes().entries(folder_sources(folder)))

    def send(self, item: Item, **options) -> dict:
        return send_item(self.remote, item, self.run, Hashes(), self.facts, self.reserve, **options)


@pytest.fixture
def sender(laptop):  # noqa: F811
    return Sender(laptop)


def test_a_folder_arrives_whole_and_only_once(sender, laptop):  # noqa: F811
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 20 * MB, "model-2.safetensors": 3 * MB})
    first = sender.send(sender.item(source))
    assert first["sent_bytes"] == first["bytes"] and tree(laptop.there / "merged") == tree(source)
    assert (laptop.there / "merged" / "config.json").stat().st_mtime == (source / "config.json").stat().st_mtime
    assert sender.send(sender.item(source))["sent_bytes"] == 0
    assert os.listdir(laptop.there / ".surgvqa" / "staging") == []


def test_modes_are_kept(sender, laptop):  # noqa: F811
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 1000})
    (source / "model-1.safetensors").chmod(0o600)
    sender.send(sender.item(source))
    there = laptop.there / "merged"
    assert [(there / n).stat().st_mode & 0o777 for n in ("model-1.safetensors", "config.json")] == [0o600, 0o644]


def test_only_the_changed_shard_is_sent(sender, laptop):  # noqa: F811
    sizes = {f"model-{i}.safetensors": 2 * MB for i in range(4)}
    source = checkpoint(laptop.workspace / "merged", sizes)
    sender.send(sender.item(source))
    (source / "model-2.safetensors").write_bytes(random.Random(9).randbytes(MB))
    (source / "model-3.safetensors").unlink()
    second = sender.send(sender.item(source))
    assert second["sent_bytes"] == MB and tree(laptop.there / "merged") == tree(source)
    elsewhere = sender.send(sender.item(source, "copy"))  # the same content under another name
    assert elsewhere["sent_bytes"] == 0 and tree(laptop.there / "copy") == tree(source)


def test_what_we_did_not_make_is_never_replaced(sender, laptop):  # noqa: F811
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": MB})
    theirs = checkpoint(laptop.there / "merged", {"model-1.safetensors": MB}, seed=5)
    before = tree(theirs)
    with pytest.raises(SurgvqaError, match="not made by upload"):
        sender.send(sender.item(source))
    assert tree(theirs) == before
    shutil.rmtree(theirs)
    sender.send(sender.item(source))
    (laptop.there / "merged" / "notes.txt").write_text("mine")  # somebody put a file into our folder
    (source / "config.json").write_text("{}")
    with pytest.raises(SurgvqaError, match=r"notes\.txt"):
        sender.send(sender.item(source))
    assert (laptop.there / "merged" / "notes.txt").read_text() == "mine"


def test_what_lies_there_by_hand_is_recognised_by_hash(sender, laptop):  # noqa: F811
    source = checkpoint(laptop.workspace / "stage1", {"model-1.safetensors": 3 * MB})
    shutil.copytree(source, laptop.there / "stage1")
    assert sender.send(sender.item(source, "stage1"))["sent_bytes"] == 0
    (source / "config.json").write_text("{}")
    with pytest.raises(SurgvqaError, match="not made by upload"):
        sender.send(sender.item(source, "stage1"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_resume_after_the_client_is_killed(laptop, share):  # noqa: F811
    """kill -9 of the uploading process: the second attempt re-sends at most the chunks that were on their way."""
    size = 96 * MB
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": size})
    relay = Relay(laptop.server.port, bytes_per_s=50 * MB)
    laptop.server.write_config(port=relay.port)
    words = [sys.executable, "-m", "remote", "upload", "gpuhost", "--model_name_or_path", "merged", "--streams", "2"]
    process = subprocess.Popen(words, cwd=laptop.workspace, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while relay.passed < share * size:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (laptop.there / "merged").exists()  # nothing under its final name before it is whole
    time.sleep(0.3)
    relay.bytes_per_s, before = None, relay.passed
    done = laptop.json("upload", "gpuhost", "--model_name_or_path", "merged", "--streams", "2")
    assert tree(laptop.there / "merged") == tree(source)
    in_sshd = 4 * MB  # a channel's window and the pipe behind it
    most = size - before + 2 * (transfer_room.SHORT_LINK_CHUNK + in_sshd)
    assert done["sent_bytes"] <= most and (share < 0.5 or done["sent_bytes"] < size * 0.8)
    relay.close()


def test_goes_on_when_sshd_dies_in_the_middle(sender, laptop):  # noqa: F811
    """Listener and sessions are killed; the same upload goes on by itself once sshd is back."""
    size = 40 * MB
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": size})
    relay = Relay(laptop.server.port, bytes_per_s=25 * MB)
    laptop.server.write_config(port=relay.port)
    sender.connect()

    def crash():
        while relay.passed < size / 3:
            time.sleep(0.01)
        laptop.server.stop()
        time.sleep(1.5)
        laptop.server.start()

    thread = threading.Thread(target=crash)
    thread.start()
    result = sender.send(sender.item(source), streams=2, patience_s=30)
    thread.join()
    assert tree(laptop.there / "merged") == tree(source)
    assert result["sent_bytes"] < size + 2 * 2 * transfer_room.SHORT_LINK_CHUNK
    relay.close()


def test_another_host_key_in_the_middle_is_refused(sender, laptop):  # noqa: F811
    size = 30 * MB
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": size})
    relay = Relay(laptop.server.port, bytes_per_s=25 * MB)
    laptop.server.write_config(port=relay.port)
    sender.connect()

    def another():
        until(lambda: relay.passed > size / 3)
        laptop.server.stop()
        laptop.server.new_host_key()
        laptop.server.start()

    thread = threading.Thread(target=another)
    thread.start()
    with pytest.raises(ChangedHostKey, match="refused the host key"):
        sender.send(sender.item(source), streams=2, patience_s=30)
    thread.join()
    assert not (laptop.there / "merged").exists()
    relay.close()


def test_goes_on_after_twenty_seconds_without_network(sender, laptop):  # noqa: F811
    size = 40 * MB
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": size})
    relay = Relay(laptop.server.port, bytes_per_s=10 * MB)
    laptop.server.write_config(port=relay.port)
    sender.connect()

    def outage():
        while relay.passed < size / 3:
            time.sleep(0.01)
        relay.freeze()
        time.sleep(20)
        relay.cut()
        relay.thaw()

    thread = threading.Thread(target=outage)
    thread.start()
    sender.send(sender.item(source), patience_s=90)
    thread.join()
    assert tree(laptop.there / "merged") == tree(source)
    relay.close()


def test_gives_up_with_a_way_on_when_the_host_stays_away(sender, laptop):  # noqa: F811
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 30 * MB})
    item = sender.item(source)
    sender.remote.ask("begin", item=item.wire())
    laptop.server.stop()
    one = transfer_room.Transfer(sender.reserve, item, {}, rtt_s=0.0, patience_s=2.0)
    with pytest.raises(SurgvqaError, match="run the same upload again"):
        one.run()
    assert not (laptop.there / "merged").exists()


def test_a_source_that_changes_meanwhile_is_noticed(sender, laptop):  # noqa: F811
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 20 * MB})
    item = sender.item(source)
    os.utime(source / "model-1.safetensors", (1, 1))
    with pytest.raises(SurgvqaError, match=r"model-1.*changed while it was sent"):
        sender.send(item)
    assert not (laptop.there / "merged").exists()


@pytest.mark.parametrize("name", ["empty.txt", "config.json"])
def test_a_source_that_is_gone_meanwhile_is_one_line(sender, laptop, name):  # noqa: F811
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 1000})
    item = sender.item(source)
    (source / name).unlink()
    with pytest.raises(SurgvqaError, match=name):
        sender.send(item)
    assert not (laptop.there / "merged").exists()


def test_other_content_of_the_same_size_and_time_is_noticed(sender, laptop):  # noqa: F811
    """What rsync would skip, and what a stale hash cache would hide: the host hashes what arrived."""
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": MB})
    shard = source / "model-1.safetensors"
    stat = shard.stat()
    item = sender.item(source)
    with open(shard, "r+b") as file:
        file.write(b"other")
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(SurgvqaError, match="changed while it was sent"):
        sender.send(item)
    assert not (laptop.there / "merged").exists()
    sender.send(sender.item(source))  # the wrong hash was forgotten
    assert tree(laptop.there / "merged") == tree(source)


def test_a_shorter_source_is_noticed(sender, laptop):  # noqa: F811
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 20 * MB})
    item = sender.item(source)
    os.truncate(source / "model-1.safetensors", 5 * MB)
    with pytest.raises(SurgvqaError, match="changed while it was sent"):
        sender.send(item)
    assert not (laptop.there / "merged").exists()


def test_damage_in_the_staging_folder_is_found_and_mended(sender, laptop):  # noqa: F811
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 9 * MB, "model-2.safetensors": 2 * MB})
    item = sender.item(source)
    sender.remote.ask("begin", item=item.wire())
    half = transfer_room.Transfer(sender.reserve, item, {}, rtt_s=0.0)
    half.run()
    staged = laptop.there / ".surgvqa" / "staging" / item.digest / "files"
    index = next(i for i, e in enumerate(item.entries) if e.path == "model-1.safetensors")
    with open(staged / str(index), "r+b") as file:
        file.seek(12345)
        file.write(b"damage")
    result = sender.send(item)
    assert result["sent_bytes"] == 9 * MB and tree(laptop.there / "merged") == tree(source)


def test_a_broken_publish_is_finished_by_the_next_upload(tmp_path, monkeypatch):
    """The agent dies at every step of the publication in turn; the next attempt needs no byte again."""
    source = checkpoint(tmp_path / "merged", {"a.safetensors": 1000, "b.safetensors": 2000})
    workspace = str(tmp_path / "host")
    os.mkdir(workspace)

    def stage(item):
        """As if every chunk had arrived."""
        answer = staging_room.begin(None, workspace, item.wire())
        if answer["complete"]:
            return 0
        sent = 0
        staging = Path(workspace, ".surgvqa", "staging", item.digest)
        for i, entry in enumerate(item.entries):
            if sum(n for _, n in answer["done"].get(str(i), [])) < entry.size:
                (staging / "files" / str(i)).write_bytes(entry.source.read_bytes())
                staging_room._note(str(staging), [(i, 0, entry.size)])
                sent += entry.size
        return sent

    hashes = Hashes(tmp_path / "cache.json")
    for version in range(2):
        (source / "a.safetensors").write_bytes(bytes([version]) * 1000)
        item = Item("merged", "folder", hashes.entries(folder_sources(source)))
        assert stage(item) > 0
        for step in range(1, 40):
            calls = 0

            def dying(real, step=step):
                def call(*arguments, **options):
                    nonlocal calls
                    calls += 1
                    if calls == step:
                        raise KeyboardInterrupt
                    return real(*arguments, **options)

                return call

            with monkeypatch.context() as patch:
                for name in ("rename", "replace", "unlink", "utime"):
                    patch.setattr(os, name, dying(getattr(os, name)))
                try:
                    staging_room.publish(None, workspace, item.wire())
                    break
                except KeyboardInterrupt:
                    pass
            assert stage(item) == 0, f"version {version}, step {step}"
            if staging_room.begin(None, workspace, item.wire())["complete"]:
                break
        assert tree(Path(workspace, "merged")) == tree(source), (version, step)


def test_a_full_disk_is_said_before_and_during(sender, laptop):  # noqa: F811
    if os.getuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    small = laptop.root / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(small)]).returncode:
        pytest.skip("no tmpfs here")
    try:
        laptop.host(workspace=str(small / "ws"), python=sys.executable)
        sender = Sender(laptop)
        source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 20 * MB})
        with pytest.raises(SurgvqaError, match=r"disk full: 0\.02 GB to come, 0\.01 GB free"):
            sender.send(sender.item(source))
        fits = checkpoint(laptop.workspace / "other", {"model-1.safetensors": 10 * MB})
        item = sender.item(fits, "other")
        real = sender.remote.ask

        def call(op, **params):
            answer = real(op, **params)
            if op == "begin":  # somebody else fills the disk meanwhile
                (small / "filler").write_bytes(b"x" * 8 * MB)
            return answer

        sender.remote.ask = call
        with pytest.raises(SurgvqaError, match="disk full"):
            sender.send(item)
        assert not (small / "ws" / "other").exists()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_connections_made_ahead_serve_and_leave_nothing(sender, laptop):  # noqa: F811
    reserve = sender.reserve = Reserve(sender.remote.host, None, 4)

    def agents() -> int:
        lines = [cmdline(pid).split(b"\0") for pid in descendants(laptop.server.process.pid)]
        return sum(line[0] == sys.executable.encode() for line in lines)

    until(lambda: agents() == 5)  # with the one that is asked
    broken = reserve._waiting[-1]  # the next to be taken
    broken.kill()
    broken.process.wait()
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 3 * MB})
    sender.send(sender.item(source), streams=1)
    assert tree(laptop.there / "merged") == tree(source) and len(reserve._waiting) == 1
    reserve.close()
    sender.remote.close()
    until(lambda: agents() == 0)


@pytest.mark.parametrize(
    ("before_s", "now_s", "streams"), [(0.001, 0.002, 4), (0.001, 0.014, 2), (0.012, 0.014, 4), (None, None, 4)]
)
def test_a_full_link_is_left_alone(before_s, now_s, streams):
    """More streams are tried where packets wait no longer than before; a full link's queue would only overflow."""
    live = [SimpleNamespace(live=True, speaking=True, retiring=False)] * 2
    queue = SimpleNamespace(chunks=1000, bytes=10**11)
    one = SimpleNamespace(streams=live, wanted=2, most=16, rtt_s=0.02, queue=queue, history=[], received=0)
    one.queueing = lambda: before_s
    tuner = transfer_room.Tuner(one)
    one.queueing = lambda: now_s
    for tenth in range(30):
        one.received = tenth * 12 * MB
        tuner.look(tenth / 10)
    assert one.wanted == streams


# --- names -----------------------------------------------------------------------------------------------------------

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
        wire = Item("n", "files", entries).wire()
        wire["files"][0][0] = bad
        with pytest.raises(SurgvqaError, match=r"inside the workspace|leaves the workspace"):
            sender.remote.ask("begin", item=wire)
    for bad in ("../../x", "a/b", ""):
        wire = {**Item("n", "files", entries).wire(), "digest": bad}
        with pytest.raises(SurgvqaError):
            sender.remote.ask("begin", item=wire)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_cheaper_way_depends_on_the_link():
    merged, adapter = Way("merged", [], 17_900 * MB), Way("adapter", [], 500 * MB, merge_bytes=17_400 * MB)
    assert cheapest([merged, adapter], 20 * MB).name == "adapter"
    assert cheapest([merged, adapter], 2000 * MB).name == "merged"


def test_the_merge_reports_hashes_are_used_and_not_trusted(tmp_path):
    folder = checkpoint(tmp_path / "m", {"a.safetensors": 100, "b.safetensors": 100})
    (folder / "merge_report.json").write_text(json.dumps({"shards": {"a.safetensors": {"sha256": "f" * 64}}}))
    later = (folder / "merge_report.json").stat().st_mtime_ns + 1
    hashes = Hashes(tmp_path / "cache.json")
    found = {e.path: e.sha256 for e in hashes.entries(folder_sources(folder))}
    assert found["a.safetensors"] == "f" * 64 and len(set(found["b.safetensors"])) > 1
    os.utime(folder / "a.safetensors", ns=(later, later))  # touched since the merge
    assert Hashes(tmp_path / "other.json").entries(folder_sources(folder))[-2].sha256 != "f" * 64


def test_chunks_cover_exactly_what_is_missing():
    entry = lambda size: type("E", (), {"size": size})  # noqa: E731
    item = type("I", (), {"entries": [entry(3 * transfer_room.CHUNK + 5), entry(0), entry(7)]})
    chunk = transfer_room.CHUNK
    found = chunks.chunks_of(item, {0: [[chunk, chunk]], 2: [[0, 7]]}, chunk)
    assert [(c.index, c.offset, c.length) for c in found] == [(0, 0, chunk), (0, 2 * chunk, chunk), (0, 3 * chunk, 5)]


def data_workspace(folder: Path) -> None:
    """Two samples over three frames, an unneeded frame and an unneeded question."""
    for name in ("v1/v1_1.jpg", "v1/v1_2.jpg", "v2/v2_7.jpg", "v2/v2_8.jpg"):
        (folder / "frames" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "frames" / name).write_bytes(name.encode() * 10)
    for name in ("v1/q1.wav", "v2/q2.wav", "v2/q3.wav"):
        (folder / "audio" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "audio" / name).write_bytes(name.encode())
    samples = [
        {"id": "q1", "video_id": "v1", "frames": ["v1_1", "v1_2"]},
        {"id": "q2", "video_id": "v2", "frames": ["v2_7"]},
    ]
    common = {"question": "Is it?", "question_type": "t", "answer": "Yes it is.", "short_answer": "yes"}
    (folder / "train.jsonl").write_text("".join(json.dumps({**s, **common}) + "\n" for s in samples))
    (folder / "surgvqa.toml").write_text(
        'train_data_path = "train.jsonl"\nframes_dir = "frames"\naudio_dir = "audio"\n[train]\nmax_steps = 3\n'
    )


def test_the_command_sends_only_the_data_that_is_named(laptop):  # noqa: F811
    data_workspace(laptop.workspace)
    planned = laptop.json("upload", "gpuhost", "--what", "data", "--dry-run")
    assert planned["data"]["files"] == 6 and not (laptop.there / "train.jsonl").exists()
    laptop.json("upload", "gpuhost", "--what", "data")
    sent = tree(laptop.there)
    assert {n for n in sent if not n.startswith((".surgvqa", "surgvqa.toml"))} == {
        "train.jsonl", "frames/v1/v1_1.jpg", "frames/v1/v1_2.jpg", "frames/v2/v2_7.jpg", 
        "audio/v1/q1.wav", "audio/v2/q2.wav",
    }  # fmt: skip
    assert b'frames_dir = "frames"' in sent["surgvqa.toml"] and b"max_steps = 3" in sent["surgvqa.toml"]
    assert laptop.json("upload", "gpuhost", "--what", "data")["sent_bytes"] == 0
    (laptop.workspace / "frames" / "v1" / "v1_1.jpg").write_bytes(b"new")
    assert laptop.json("upload", "gpuhost", "--what", "data")["sent_bytes"] == 3
    assert (laptop.there / "frames" / "v1" / "v1_1.jpg").read_bytes() == b"new"
    (laptop.workspace / "frames" / "v1" / "v1_1.jpg").unlink()
    failed = laptop.command("upload", "gpuhost", "--what", "data", check=2)
    assert "v1_1" in failed.stderr.splitlines()[-1]


def test_files_deleted_or_replaced_here_are_named_and_removed_there(laptop):  # noqa: F811
    """A frame of another extension replaces its predecessor; the rest stays until --delete, which takes only ours."""
    data_workspace(laptop.workspace)
    laptop.json("upload", "gpuhost", "--what", "data")
    frames, there = laptop.workspace / "frames" / "v1", laptop.there / "frames" / "v1"
    (frames / "v1_1.jpg").rename(frames / "v1_1.png")
    lines = (laptop.workspace / "train.jsonl").read_text().splitlines(keepends=True)
    (laptop.workspace / "train.jsonl").write_text(lines[0])
    (laptop.there / "frames" / "v2" / "mine.jpg").write_text("somebody's own")
    done = laptop.command("upload", "gpuhost", "--what", "data", "--json")
    assert "frames/v2/v2_7.jpg" in done.stderr and "--delete" in done.stderr
    assert json.loads(done.stdout)["deleted"] == ["frames/v1/v1_1.jpg"]
    assert sorted(os.listdir(there)) == ["v1_1.png", "v1_2.jpg"]
    (laptop.there / "audio" / "v2" / "q2.wav").write_text("changed there")
    done = laptop.command("upload", "gpuhost", "--what", "data", "--delete", "--json")
    assert json.loads(done.stdout)["deleted"] == ["frames/v2/v2_7.jpg"]
    assert os.listdir(laptop.there / "frames" / "v2") == ["mine.jpg"]
    assert "audio/v2/q2.wav" in done.stderr and (laptop.there / "audio" / "v2" / "q2.wav").exists()


def test_nothing_starts_on_data_whose_publication_broke(tmp_path):
    """One file of a set of files was renamed, the next was not: whatever names one of them is not whole."""
    entry = [1, "0" * 64, 1]
    files = {"train.jsonl": entry, "frames/v1/v1_1.jpg": entry}
    agent_files.write_record(str(tmp_path), "data", {"kind": "files", "state": "publishing", "files": files})
    for path in ("train.jsonl", "frames", "frames/v1"):
        assert agent_files.unfinished(str(tmp_path), ["merged", path]) == path
    assert agent_files.unfinished(str(tmp_path), ["merged", "frame", "audio"]) is None
    agent_files.write_record(str(tmp_path), "data", {"kind": "files", "state": "ready", "files": files})
    assert agent_files.unfinished(str(tmp_path), ["train.jsonl"]) is None


def test_a_checkpoint_may_be_called_data(laptop):  # noqa: F811
    data_workspace(laptop.workspace)
    checkpoint(laptop.workspace / "data", {"model.safetensors": 1000})
    for _ in range(2):
        laptop.json("upload", "gpuhost", "--model_name_or_path", "data")
    again = laptop.json("upload", "gpuhost", "--model_name_or_path", "data")
    assert again["sent_bytes"] == 0 and tree(laptop.there / "data") == tree(laptop.workspace / "data")
    assert (laptop.there / "train.jsonl").is_file()


def test_a_detached_upload_is_a_run_of_its_own(laptop):  # noqa: F811
    checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 5 * MB})
    started = laptop.json("upload", "gpuhost", "--model_name_or_path", "merged", "--detach")
    folder = Path(started["folder"])
    deadline = time.monotonic() + 30
    while (
        '"kind": "finished"' not in (folder / "events.jsonl").read_text()
        if (folder / "events.jsonl").exists()
        else True
    ):
        assert time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.1)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events[-1]["state"] == "finished" and any(e["kind"] == "progress" for e in events)
    assert (laptop.there / "merged" / "model-1.safetensors").stat().st_size == 5 * MB


def test_nothing_to_upload_is_said(laptop):  # noqa: F811
    assert "nothing to upload" in laptop.command("upload", "gpuhost", check=2).stderr
    assert "no such folder" in laptop.command("upload", "gpuhost", "--model_name_or_path", "no", check=2).stderr
    with pytest.raises(UsageError):
        remote_name(laptop.workspace, Workspace(laptop.workspace, {}, {}))


RECEIVE = """
import os, sys
from remote.agent import staging
if sys.argv[2] == "without":
    os.splice = None
line, pipe = sys.stdin.buffer.readline(), staging.Input(sys.stdin.buffer)
assert line == b"request\\n" and pipe.read(4) == b"head"
target, at = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), 7
while count := pipe.copy(target, at, 3_000_000):
    at += count
"""


@pytest.mark.parametrize("splice", ["with", "without"])
@pytest.mark.parametrize("pair", [os.pipe, socket.socketpair])  # sshd may be built to use either
def test_the_receiver_takes_every_byte_by_whatever_way_the_host_has(tmp_path, splice, pair):
    body = random.Random(1).randbytes(2_500_000)
    theirs, ours = (end if isinstance(end, int) else end.detach() for end in pair())
    words = [sys.executable, "-c", RECEIVE, str(tmp_path / "out"), splice]
    process = subprocess.Popen(words, stdin=theirs, cwd=ROOT)
    os.close(theirs)
    with open(ours, "wb") as stream:
        stream.write(b"request\nhead" + body)
    assert process.wait(60) == 0
    assert (tmp_path / "out").read_bytes() == bytes(7) + body
