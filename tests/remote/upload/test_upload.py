"""Uploads to a real sshd: nothing lost, nothing half-done, nothing of anybody else's touched."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from sender import Sender, wire
from shards import checkpoint, tree
from sshd import Relay, cmdline, laptop  # noqa: F401
from waiting import until

from remote.agent import staging as staging_room
from remote.ssh.errors import ChangedHostKey
from remote.ssh.process import Reserve
from remote.upload import streams as transfer_room
from remote.upload.hashes import Hashes, Item
from remote.upload.offers import ask_of
from remote.upload.plan import folder_sources
from surgvqa.errors import SurgvqaError
from surgvqa.runs.process import descendants

pytestmark = pytest.mark.slow

MB = 1_000_000


def test_a_folder_arrives_whole_and_only_once(sender, laptop):  # noqa: F811
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 20 * MB, "model-2.safetensors": 3 * MB})
    first = sender.send(sender.item(source))
    assert first["sent_bytes"] == first["bytes"] and tree(laptop.there / "merged") == tree(source)
    assert (laptop.there / "merged" / "config.json").stat().st_mtime == (source / "config.json").stat().st_mtime
    assert sender.send(sender.item(source))["sent_bytes"] == 0
    assert os.listdir(laptop.there / ".surgvqa" / "staging") == []


def test_the_holes_of_a_sparse_file_are_neither_sent_nor_written(sender, laptop):  # noqa: F811
    source = checkpoint(laptop.workspace / "merged", {})
    with open(source / "model.safetensors", "wb") as file:
        file.write(b"\1" * MB)
        file.seek(60 << 20)
        file.write(b"\2" * MB)
        file.truncate(100 << 20)
    there = laptop.there / "merged/model.safetensors"
    assert sender.send(sender.item(source))["sent_bytes"] < 20 << 20 and there.stat().st_blocks * 512 < 20 << 20
    assert there.read_bytes() == (source / "model.safetensors").read_bytes()


def test_modes_are_kept_and_follow_without_sending_anything(sender, laptop):  # noqa: F811
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 1000, "model-2.safetensors": 2 * MB})
    modes = {"model-1.safetensors": 0o600, "model-2.safetensors": 0o640, "config.json": 0o666, "empty.txt": 0o644}

    def there() -> dict[str, int]:
        return {name: (laptop.there / "merged" / name).stat().st_mode & 0o777 for name in modes}

    for _ in range(2):
        for name, mode in modes.items():
            (source / name).chmod(mode)
        sent = sender.send(sender.item(source))["sent_bytes"]
        assert there() == modes
        modes = dict.fromkeys(modes, 0o600)
    assert sent == 0


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
    ask_of(sender.remote, "begin", item)
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


@pytest.mark.parametrize("size", [MB, 2 * MB])
def test_other_content_of_the_same_size_and_time_is_noticed(sender, laptop, size):  # noqa: F811
    """What rsync would skip, and what a stale hash cache would hide: the host hashes what arrived."""
    source = checkpoint(laptop.workspace / "merged", {"model-1.safetensors": size})
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
    ask_of(sender.remote, "begin", item)
    half = transfer_room.Transfer(sender.reserve, item, {}, rtt_s=0.0)
    half.run()
    with open(laptop.there / ".surgvqa" / "staging" / item.digest / "tree" / "model-1.safetensors", "r+b") as file:
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
        answer = staging_room.begin(None, workspace, wire(item))
        if answer["complete"]:
            return 0
        sent = 0
        staging = Path(workspace, ".surgvqa", "staging", item.digest)
        for i, entry in enumerate(item.entries):
            if i not in answer["whole"]:
                (staging / "tree" / entry.path).write_bytes(Path(entry.source).read_bytes())
                staging_room.note(str(staging), [(i, 0, entry.size)])
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
                    staging_room.publish(None, workspace, wire(item))
                    break
                except KeyboardInterrupt:
                    pass
            assert stage(item) == 0, f"version {version}, step {step}"
            if staging_room.begin(None, workspace, wire(item))["complete"]:
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
    reserve = sender.reserve = Reserve(sender.remote.host, None)
    reserve.fill(4)

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
