"""The questions that an upload asks before it is loaded: asked once, and never more than a shortcut."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from shards import checkpoint, tree
from sshd import Relay, laptop  # noqa: F401

from remote.ssh.connection import Remote
from remote.ssh.hosts import resolve
from remote.upload import ahead, command
from remote.upload.link import Link

pytestmark = pytest.mark.slow

UPLOAD = ("upload", "gpuhost", "--what", "merged", "--model_name_or_path", "merged")


@pytest.fixture
def uploaded(laptop):  # noqa: F811
    """A laptop whose checkpoint is on the host already."""
    checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 300_000})
    laptop.here(*UPLOAD)
    return laptop


def logins(laptop) -> int:  # noqa: F811
    return (laptop.server.root / "sshd.log").read_text().count("Accepted publickey")


def same_there(laptop) -> bool:  # noqa: F811
    return tree(laptop.there / "merged") == tree(laptop.workspace / "merged")


def in_a_process(laptop) -> tuple[dict, bool]:  # noqa: F811
    """An upload's answer, and whether its process has loaded paramiko."""
    code = "import sys; from remote.start import main; main(); print('paramiko' in sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *UPLOAD, "--json"], cwd=laptop.workspace, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr.splitlines()[-1] == "True"


def test_an_upload_of_what_is_there_needs_one_connection_and_no_paramiko(uploaded):
    before = logins(uploaded)
    answer, paramiko = in_a_process(uploaded)
    assert answer["sent_bytes"] == 0 and not paramiko and logins(uploaded) == before + 1


def test_a_first_small_upload_needs_no_paramiko(laptop):  # noqa: F811
    checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 300_000, "model-2.safetensors": 3_000_000})
    answer, paramiko = in_a_process(laptop)
    assert answer["sent_bytes"] > 3_300_000 and same_there(laptop)
    assert not paramiko and logins(laptop) == 4  # who asks, two streams, and who verifies the large file


def test_the_link_of_a_large_upload_is_watched(laptop, monkeypatch):  # noqa: F811
    monkeypatch.setattr(command, "WATCHED_BYTES", 100_000)
    seen = []
    queueing = Link.queueing
    monkeypatch.setattr(Link, "queueing", lambda self: seen.append(queueing(self)))
    checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 300_000})
    laptop.here(*UPLOAD)
    assert seen and all(isinstance(seconds, float) for seconds in seen) and same_there(laptop)


def test_an_unknown_key_is_asked_about_at_a_first_upload_too(laptop):  # noqa: F811
    laptop.server.known_hosts.unlink()
    checkpoint(laptop.workspace / "merged", {"model-1.safetensors": 300_000})
    assert "host key" in laptop.command(*UPLOAD, check=1).stderr
    assert laptop.here(*UPLOAD, "--accept-new-host-key")["sent_bytes"] > 300_000 and same_there(laptop)


def test_what_has_changed_here_or_there_is_sent_all_the_same(uploaded):
    (uploaded.workspace / "merged" / "model-1.safetensors").write_bytes(b"other" * 50_000)
    assert uploaded.here(*UPLOAD)["sent_bytes"] > 0 and same_there(uploaded)
    (uploaded.there / "merged" / "model-1.safetensors").write_bytes(b"damaged")
    assert uploaded.here(*UPLOAD)["sent_bytes"] > 0 and same_there(uploaded)


@pytest.mark.parametrize("fault", [("cut", 0), ("cut", 2000), ("stalled", 2000)])
def test_a_connection_that_breaks_costs_nothing(uploaded, monkeypatch, fault):
    monkeypatch.setattr(ahead, "SPEAKS_IN_S", 1.0)
    relay = Relay(uploaded.server.port)
    uploaded.server.write_config(port=relay.port)
    relay.break_next(*fault)
    assert uploaded.here(*UPLOAD)["sent_bytes"] == 0
    assert relay.broken == 1
    relay.close()


def test_a_connection_that_is_lost_later_is_made_again(uploaded, monkeypatch):
    asked = Remote.ask_once

    def lost_before(self, op, **params):
        monkeypatch.setattr(Remote, "ask_once", asked)
        uploaded.server.kill_sessions()
        return asked(self, op, **params)

    monkeypatch.setattr(Remote, "ask_once", lost_before)
    before = logins(uploaded)
    assert uploaded.here(*UPLOAD)["sent_bytes"] == 0 and logins(uploaded) == before + 2


@pytest.mark.parametrize(
    "script", ["#!/bin/sh\necho conda init; exec sleep 60\n", "#!/bin/sh\nexit 3\n", "#!/bin/sh\nyes\n"]
)
def test_a_host_that_does_not_speak_is_not_waited_for(uploaded, monkeypatch, script):
    monkeypatch.setattr(ahead, "SPEAKS_IN_S", 0.5)
    python = uploaded.root / "python"
    python.write_text(script)
    python.chmod(0o755)
    uploaded.host(python=str(python))
    first = ahead.Ahead(resolve("gpuhost", uploaded.workspace))
    process = first._process
    assert process and first.answers() is None
    assert process.process.returncode is not None


def test_nobody_is_asked_before_the_words_are_understood(uploaded, monkeypatch):
    monkeypatch.chdir(uploaded.workspace)
    before = logins(uploaded)
    for words in ([], ["--help"], ["gpuhost", "--workspace=x"], ["gpuhost", "--checksum"]):
        ahead.start(words)
    assert not ahead._started and logins(uploaded) == before
