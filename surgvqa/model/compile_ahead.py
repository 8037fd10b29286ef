"""Compiles a training's layer in a child process, while this process loads the model and encodes.

The compiled layer passes through torch's cache on disk. Its keys are equal because the child runs the same code on a
model of the same sizes with two layers (compile_child.py). If the child fails or is late, this process compiles the
layer itself in its first step: only speed changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHILD = (sys.executable, "-m", "surgvqa.model.compile_child")
LONGEST_S = 60.0
"""A child that has begun to compile is waited for at most this long."""
MARK = "surgvqa_compiled-"
"""Beginning of the names of empty files in the compiler's cache folder, one for each job that is done."""


@dataclass(frozen=True)
class LayerJob:
    """What decides how a decoder layer is compiled for training."""

    checkpoint: str
    lora: dict[str, Any]
    attention: str
    keep: str
    recomputing: tuple[bool, ...]
    """The kinds of layers: (False,) if none recomputes, (True,) if all do, else both."""
    input_needs_grad: tuple[bool, ...]
    """Whether a layer's input needs a gradient. The first layer's needs none if nothing before it is trained."""
    rows: int
    tokens: int
    dtype: str
    autocast: bool
    device: str

    def mark(self, cache_folder: Path, device_name: str) -> Path:
        """The file that says that this job is done on this device with these versions."""
        config = Path(self.checkpoint, "config.json").read_bytes()
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        found = {**asdict(self), "checkpoint": hashlib.sha256(config).hexdigest(), "device_name": device_name}
        key = json.dumps(found | versions, sort_keys=True, default=str)
        return cache_folder / f"{MARK}{hashlib.sha256(key.encode()).hexdigest()[:16]}"


class CompileAhead:
    """The child, started by `begin` and ended by `finish`, or at the end of this context."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._said: dict[str, Any] = {}
        self._skipped = ""
        self._heard = threading.Event()
        """Set when the child will say no more."""

    def __enter__(self) -> CompileAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def begin(self, job: LayerJob, mark: Path) -> None:
        """Starts the child, unless an earlier run has left the compiled layer in the cache."""
        if mark.exists():
            self._skipped = "an earlier run has compiled this layer"
            return
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        try:
            self._child = subprocess.Popen(
                CHILD,
                env=environment,
                stdin=subprocess.PIPE,  # open for as long as this process lives, and the child ends with it
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # so that its compiler's processes can be ended with it
            )
            assert self._child.stdin
            self._child.stdin.write(json.dumps({"job": asdict(job), "mark": str(mark)}) + "\n")
            self._child.stdin.flush()
        except OSError as error:
            self._said["failed"] = error.strerror
            return
        threading.Thread(target=self._listen, args=(self._child,), daemon=True, name="compile ahead").start()

    def finish(self) -> str:
        """Ends the child and returns what came of it, in words; "" if none was started.

        Waits for a child that is compiling: it will be done sooner than this process, which would begin only now.
        """
        if self._skipped or (self._child is None and not self._said):
            return self._skipped
        began = time.monotonic()
        if "begun" in self._said:
            self._heard.wait(LONGEST_S)
        said, waited = dict(self._said), time.monotonic() - began
        self._end()
        if "done" in said:
            return f"a layer was compiled ahead in {said['done']:.1f} s, waited for {waited:.1f} s"
        why = said.get("failed") or ("it took too long" if "begun" in said else "the model was loaded before it began")
        return f"no layer was compiled ahead ({why}): the first step compiles it"

    def _listen(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout
        for line in child.stdout:
            with contextlib.suppress(ValueError):
                self._said.update(json.loads(line))
            if "done" in self._said or "failed" in self._said:
                break
        else:
            self._said.setdefault("failed", "the process ended")
        self._heard.set()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        with contextlib.suppress(OSError):
            assert child.stdin
            child.stdin.close()


def end_with_parent() -> None:
    """For the child: returns only by ending this process and those of its compiler, when its stdin is closed."""
    while sys.stdin.readline():
        pass
    os.killpg(os.getpid(), signal.SIGKILL)  # it leads a session of its own
