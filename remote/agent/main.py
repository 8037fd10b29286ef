"""The host's side of every remote command: runs there under any Python from 3.8, standard library only.

One process answers one request, and the next after one that says `"more": true`. It writes the mark, then one JSON
object a line: messages, `{"beat": …}` every 2 s so that silence means a lost connection, and last `{"done": {…}}` or
`{"error": "one line", "usage": bool}`. It ends with its input or when its output is closed, so nothing of it is left
behind when the connection goes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from remote.agent import files, jobs, machine, runs, staging
from remote.agent.protocol import BEAT_S, MARK
from surgvqa.errors import SurgvqaError


def ready(channel: Channel, workspace: str) -> dict[str, Any]:
    """Answers at once: from now on the agent beats, so that one which waits for a request does not outlive its ssh."""
    return {}


OPERATIONS: dict[str, Callable[..., Any]] = {
    "ready": ready,
    "probe": machine.probe,
    "prepare": machine.prepare,
    "installed": machine.installed,
    "settings": machine.settings,
    "execute": machine.execute,
    "launch": jobs.launch,
    "runs": runs.runs,
    "follow": runs.follow,
    "stop": runs.stop,
    "gpus": machine.gpus,
    "begin": staging.begin,
    "receive": staging.receive,
    "verify": staging.verify,
    "publish": staging.publish,
    "known": files.known,
    "retire": files.retire,
    "merged": files.merged,
    "note_merge": files.note_merge,
    "listing": files.listing,
    "send": files.send,
}


class Channel:
    """What an operation speaks through."""

    def __init__(self, stdin: BinaryIO):
        self.stdin = stdin
        self.children: list[int] = []
        """Process groups that end with us when nobody listens any more."""
        self._lock = threading.Lock()

    def say(self, message: dict[str, Any]) -> None:
        """One message; ends the process when nobody listens any more."""
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
    """Does what is asked for; the exit code."""
    operation = OPERATIONS[request.pop("op")]
    request["workspace"] = os.path.realpath(os.path.expanduser(request["workspace"]))
    try:
        channel.say({"done": operation(channel, **request) or {}})
        return 0
    except SurgvqaError as error:
        channel.say({"error": str(error), "usage": error.exit_code == 2})
    except OSError as error:
        name = error.filename or "the host"
        text = "disk full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        channel.say({"error": f"{name}: {text}", "usage": False})
    return 1
