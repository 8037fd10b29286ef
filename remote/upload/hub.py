"""Stage 1 straight from the Hugging Face hub to the host, instead of over the laptop's uplink.

`look` and `get` are this side's. They start hub_on_host.py in the host's venv, where huggingface_hub is installed and
the host's own HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE count. There the files go into the hub's cache (a broken download
goes on), are hashed, linked into the workspace as hub/USER--NAME and recorded like an upload: from then on every upload
finds their content by hash.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from surgvqa.errors import SurgvqaError, UsageError

if TYPE_CHECKING:
    from remote.ssh.connection import Remote
    from remote.upload.hashes import Item
    from surgvqa.runs.reporter import Reporter

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[A-Za-z0-9][\w./-]*)?")


def check_id(hub_id: str) -> None:
    """Raises UsageError for anything but USER/NAME or USER/NAME@REVISION."""
    if not HUB_ID.fullmatch(hub_id) or ".." in hub_id:
        raise UsageError(f"--stage1_hub_id {hub_id!r}: expected USER/NAME or USER/NAME@REVISION")


def folder_of(hub_id: str) -> str:
    """Its folder in the host's workspace."""
    return "hub/" + hub_id.replace("/", "--")


def look(remote: Remote, hub_id: str) -> dict[str, Any]:
    """What the host can get: {"revision", "files": {path: [size, sha256 or null]}, "download_bytes"}.

    {"problem": one line} when it cannot be had there.
    """
    try:
        return list(_ask(remote, "look", hub_id))[-1]
    except _NotThere as problem:
        return {"problem": str(problem)}


def get(remote: Remote, hub_id: str, run: Reporter, patience_s: float) -> str:
    """Has the host get it; its folder in the workspace there. A lost connection is waited for `patience_s` seconds."""
    from remote.ssh.errors import Unreachable

    run.phase("hub", f"{hub_id} to {remote.host.name}")
    heard = time.monotonic()
    while True:
        try:
            for answer in _ask(remote, "get", hub_id):
                heard = time.monotonic()
                if "total" in answer:
                    run.progress("hub", min(answer["done"], answer["total"]), answer["total"], "bytes")
            return folder_of(hub_id)
        except _NotThere as problem:
            raise SurgvqaError(f"{remote.host.name}: {problem}") from None
        except Unreachable as error:
            remote.close()
            if time.monotonic() - heard > patience_s:
                raise
            run.warning(f"{error}; trying again")
            time.sleep(2.0)


def differing(item: Item, found: dict[str, Any]) -> list[str]:
    """The weights of `item` that are not on the hub with the same content, as far as the hub tells."""
    files = found["files"]
    wrong = []
    for entry in item.entries:
        if entry.path.endswith(".safetensors"):
            size, sha256 = files.get(entry.path, (None, None))
            if size != entry.size or sha256 not in (None, entry.sha256):
                wrong.append(entry.path)
    return wrong


class _NotThere(Exception):
    """One line: why the host cannot get it."""


def _ask(remote: Remote, what: str, hub_id: str) -> Iterator[dict[str, Any]]:
    """Runs this module on the host and yields its JSON lines."""
    from remote.jobs.launch import SECRETS

    facts = remote.call("probe", venv=remote.host.entry.venv)
    if not facts["has_venv"]:
        raise _NotThere(f"{hub_id}: the host has no environment yet; run surgvqa-remote setup {remote.host.name}")
    argv = [f"{facts['venv']}/bin/python", "-m", "remote.upload.hub_on_host", what, hub_id, facts["workspace"]]
    secrets = {name: os.environ[name] for name in SECRETS if os.environ.get(name)}
    last = ""
    for message in remote.stream("execute", argv=argv, env={**remote.host.entry.environment, **secrets}):
        line = message.get("line", "")
        if line.startswith('{"hub": '):
            answer = json.loads(line)["hub"]
            if "problem" in answer:
                raise _NotThere(answer["problem"])
            yield answer
        last = line.strip() or last
        if message.get("exit_code"):
            old = "No module named" in last
            raise _NotThere("run surgvqa-remote setup: the host has an older surgvqa" if old else f"{hub_id}: {last}")
