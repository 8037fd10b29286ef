"""The receiver on the host: every byte, by each way that its pipe or socket has."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys

import pytest
from places import ROOT
from sshd import Relay, cmdline, laptop  # noqa: F401

pytestmark = pytest.mark.slow

MB = 1_000_000
RECEIVE = """
import os, sys
from remote.agent import receiving as staging
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
