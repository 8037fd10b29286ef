"""The agent: the host's side of every remote command. Needs only Python 3.8 and its standard library.

One process answers one request, and the next after one that says `"more": true`. It writes the mark, then one JSON
object a line: messages, `{"beat": …}` every 2 s so that silence means a lost connection, and last `{"done": {…}}` or
`{"error": "one line", "usage": bool}`. It ends with its input or when its output is closed, so nothing of it is left
behind when the connection goes.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from remote.agent.manifest import Wanted
from remote.agent.protocol import BEAT_S, MARK
from surgvqa.errors import SurgvqaError

OPERATIONS = {
    "ready": "main",
    "probe": "machine",
    "prepare": "machine",
    "installed": "machine",
    "settings": "machine",
    "execute": "machine",
    "launch": "jobs",
    "contents": "nodes",
    "listen": "nodes",
    "reach": "nodes",
    "runs": "runs",
    "follow": "runs",
    "stop": "runs",
    "gpus": "machine",
    "can_end": "ending",
    "end_from_here": "ending",
    "ending": "ending",
    "begin": "staging",
    "receive": "receiving",
    "verify": "receiving",
    "publish": "staging",
    "known": "standing",
    "retire": "standing",
    "disk": "disk",
    "clean": "disk",
    "abandoned": "disk",
    "merged": "files",
    "note_merge": "files",
    "listing": "files",
    "send": "files",
}
"""Each is a function of its name, in a module beside this one: loaded when it is asked for."""


def operation(name: str) -> Callable[..., Any]:
    """The function of an operation."""
    found: Callable[..., Any] = getattr(importlib.import_module(f"remote.agent.{OPERATIONS[name]}"), name)
    return found


def ready(channel: Channel, workspace: str) -> dict[str, Any]:
    """Answers at once and starts the beat, so that an agent without a request does not outlive its ssh."""
    return {}


class Channel:
    """An operation's output to the laptop."""

    def __init__(self, stdin: BinaryIO):
        self.stdin = stdin
        self.children: list[int] = []
        """Process groups to kill when nobody listens any more."""
        self._lock = threading.Lock()

    def say(self, message: dict[str, Any]) -> None:
        """Sends one message. Ends the process if nobody listens any more."""
        self.write(json.dumps(message).encode() + b"\n")

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            with self._lock:
                while view:
                    view = view[os.write(1, view) :]
        except OSError:
            for group in self.children:
                with contextlib.suppress(OSError):
                    os.killpg(group, signal.SIGKILL)
            os._exit(1)

    def beat(self) -> None:
        while True:
            time.sleep(BEAT_S)
            self.say({"beat": time.time()})


def main(stdin: BinaryIO) -> None:
    """Answers the requests on `stdin`."""
    channel = Channel(stdin)
    channel.write(MARK)
    code, more, beating = 0, True, False
    while more and (line := stdin.readline()):
        request = json.loads(line)
        if request.pop("beat", True) and not beating:
            threading.Thread(target=channel.beat, daemon=True).start()
            beating = True
        more = request.pop("more", False)
        code = _answer(channel, request)
    sys.stdout.flush()
    os._exit(code)  # not held up by threads that read or hash


def _answer(channel: Channel, request: dict[str, Any]) -> int:
    """Carries out a request. Returns the exit code."""
    asked_for = operation(request.pop("op"))
    request["workspace"] = os.path.realpath(os.path.expanduser(request["workspace"]))
    try:
        channel.say({"done": asked_for(channel, **request) or {}})
        return 0
    except Wanted as missing:
        channel.say({"done": {"want": missing.of}})
        return 0
    except SurgvqaError as error:
        channel.say({"error": str(error), "usage": error.exit_code == 2})
    except OSError as error:
        name = error.filename or "the host"
        text = "disk full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        channel.say({"error": f"{name}: {text}", "usage": False})
    return 1
