"""What hosts are asked before they train together: their content, and a way to the first one."""

import threading
from types import SimpleNamespace

import pytest

from remote.agent import nodes as agent
from remote.agent.files import write_record
from remote.jobs import nodes
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError


def test_what_is_published_and_untouched_is_not_read_again(tmp_path, monkeypatch):
    workspace = str(tmp_path)
    (tmp_path / "frames").mkdir()
    for name in ("a", "b"):
        (tmp_path / "frames" / name).write_text(name)
    (tmp_path / "train.jsonl").write_text("t")
    stat = (tmp_path / "frames" / "a").stat()
    files = {"a": [stat.st_size, "0" * 64, stat.st_mtime_ns, 420]}
    write_record(workspace, "frames", {"kind": "folder", "digest": "d", "state": "ready", "files": files})
    read = []
    monkeypatch.setattr(agent, "sha256_of", lambda path: read.append(path) or "f" * 64)
    paths = ["frames", "train.jsonl", "none"]
    found = agent.contents(None, workspace, paths, rows=True)["contents"]
    assert [(one["path"], one["files"]) for one in found] == [("frames", 2), ("train.jsonl", 1), ("none", 0)]
    assert found[0]["rows"] == [["a", "0" * 64], ["b", "f" * 64]] and len(read) == 2
    (tmp_path / "frames" / "a").write_text("A")
    again = agent.contents(None, workspace, paths)["contents"]
    assert (
        again[0]["digest"] != found[0]["digest"] and again[1]["digest"] == found[1]["digest"] and not again[0]["rows"]
    )


def test_only_the_host_that_was_meant_answers():
    said, done = [], []
    channel = SimpleNamespace(say=said.append)
    waiting = threading.Thread(target=lambda: done.append(agent.listen(channel, "", "secret")))
    waiting.start()
    while not said:
        waiting.join(0.01)
    port = said[0]["port"]
    assert agent.reach(channel, "", ["127.0.0.1"], port, "another", True) == {"reached": []}
    found = agent.reach(channel, "", ["127.0.0.1"], port, "secret", False)
    assert found == {"reached": [{"address": "127.0.0.1", "interface": "lo"}]} and not done
    agent.reach(channel, "", ["127.0.0.1"], port, "secret", True)
    waiting.join(30)
    assert done == said and {"address": "127.0.0.1", "interface": "lo"} in said[0]["addresses"]
    assert agent.reach(channel, "", ["127.0.0.1"], port, "secret", False) == {"reached": []}  # the port is free


def test_what_a_training_reads_comes_from_its_options_or_the_workspace(tmp_path):
    values = {"train_data_path": str(tmp_path / "t.jsonl"), "frames_dir": str(tmp_path / "frames")}
    workspace = Workspace(tmp_path, values, {})
    argv = ["--model_name_or_path", "merged", "--frames_dir=other", "--resume", "r1", "--output_dir", "out"]
    assert nodes.inputs(argv, workspace) == ["merged", "other", "t.jsonl"]
    assert nodes.without_resume(argv) == argv[:3] + argv[5:] and nodes.without_resume(["--resume=r"]) == []


def test_a_host_names_only_addresses():
    good = ("10.0.0.1", "gpu-1.example.com")
    bad = ("::1", "a b", "-oProxy=x", "", "a;b", "x" * 300)
    assert [nodes._is_address(text) for text in good + bad] == [True] * 2 + [False] * 6


def test_a_host_that_does_not_start_leaves_nothing_running_on_the_others(monkeypatch, tmp_path):
    hosts = [SimpleNamespace(host=SimpleNamespace(name=name)) for name in ("one", "two")]
    stopped, given = [], []

    def launch(remote, command, argv, **more):
        given.append((remote.host.name, argv, more["node"], more["run"], more["env"]))
        if remote.host.name == "two":
            raise SurgvqaError("two: the GPU is taken by run r0")
        return {"run": "r1", "folder": "f", "warning": ""}

    monkeypatch.setattr(nodes, "same_content", lambda remotes, paths: None)
    monkeypatch.setattr(nodes, "meeting", lambda remotes: (("10.0.0.1:5000", "word"), ["eth0", ""]))
    monkeypatch.setattr(nodes.jobs, "launch", launch)
    monkeypatch.setattr(nodes.jobs, "stop", lambda remote, run, grace: stopped.append((remote.host.name, run)))
    argv = ["--model_name_or_path", "merged", "--resume", "r0"]
    with pytest.raises(SurgvqaError, match="two: the GPU is taken"):
        nodes.launch(hosts, "train", argv, Workspace(tmp_path, {}, {}), needs=[])
    assert stopped == [("one", "r1")]
    (_, first, *one), (_, second, *two) = given
    assert first == [*argv, "--gpus", "all"] and second == [*argv[:2], "--gpus", "all"]
    assert one[:2] == [0, ""] and two[:2] == [1, "r1"]
    assert one[2]["NCCL_SOCKET_IFNAME"] == "eth0" and "NCCL_SOCKET_IFNAME" not in two[2]
    assert two[2]["PET_NODE_RANK"] == "1" and two[2]["SURGVQA_HOST"] == "two"
