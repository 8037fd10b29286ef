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
from remote.upload import ahead
from remote.upload.remembered import known_offers

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


def test_an_upload_of_what_is_there_needs_one_connection_and_no_paramiko(uploaded):
    before = logins(uploaded)
    code = "import sys; from remote.start import main; main(); print('paramiko' in sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *UPLOAD, "--json"], cwd=uploaded.workspace, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["sent_bytes"] == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "False" and logins(uploaded) == before + 1


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


def test_nobody_is_asked_who_was_sent_nothing_or_before_the_words_are_understood(uploaded, monkeypatch):
    monkeypatch.chdir(uploaded.workspace)
    assert known_offers("gpuhost") and not known_offers("another")
    before = logins(uploaded)
    for words in ([], ["--help"], ["another"], ["gpuhost", "--workspace=x"], ["gpuhost", "--checksum"]):
        ahead.start(words)
    assert not ahead._started and logins(uploaded) == before
