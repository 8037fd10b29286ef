"""`python -m remote.upload.hub_on_host`: runs on the host and gets Stage 1 from the Hugging Face hub there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from remote.upload.hub import folder_of
from surgvqa.errors import SurgvqaError, first_line

OTHER_FORMATS = (".bin", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")
"""The same weights once more; only safetensors are read."""
PROGRESS_S = 1.0
DOWNLOADS = 4


def main(argv: list[str]) -> int:
    """`look|get USER/NAME[@REVISION] WORKSPACE`; answers on stdout, a JSON object a line."""
    what, hub_id, workspace = argv
    try:
        found = _listed(hub_id)
        if what == "look":
            found.pop("local", None)
            _say(found)
        else:
            _get(hub_id, found, workspace)
    except ImportError as error:
        return _problem(f"{hub_id}: {error}; run surgvqa-remote setup with --extra train")
    except SurgvqaError as error:
        return _problem(str(error))
    except Exception as error:  # whatever the hub's client raises
        return _problem(f"{hub_id}: {_reason(error)}")
    return 0


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps({"hub": answer}), flush=True)


def _problem(text: str) -> int:
    _say({"problem": " ".join(text.split())})
    return 0


def _reason(error: Exception) -> str:
    """One line out of the client's many, with what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "the hub wants its licence accepted; do so there, and set HF_TOKEN here"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or it is private: check the id, or set HF_TOKEN here"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the host cannot reach the hub and has no copy in its cache"
    return f"{type(error).__name__}: {first_line(error)}"


def _wanted(path: str) -> bool:
    return not path.endswith(OTHER_FORMATS) and not path.rsplit("/", 1)[-1].startswith(".")


def _split(hub_id: str) -> tuple[str, str | None]:
    name, _, revision = hub_id.partition("@")
    return name, revision or None


def _listed(hub_id: str) -> dict[str, Any]:
    """The repository's files: the hub's list, or what the cache holds when the hub cannot be reached.

    "local": the snapshot's folder, when the list comes from the cache.
    """
    from huggingface_hub import HfApi, errors, snapshot_download, try_to_load_from_cache

    name, revision = _split(hub_id)
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=20)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):  # the first also stands for gated ones
        raise
    except Exception:  # offline, or the hub is down: each client version raises another kind
        folder = snapshot_download(name, revision=revision, local_files_only=True)
        paths = [os.path.join(at, file) for at, _, files in os.walk(folder) for file in files]
        files = {os.path.relpath(path, folder): [os.path.getsize(path), None] for path in paths}
        files = {path: entry for path, entry in files.items() if _wanted(path)}
        return {"revision": os.path.basename(folder), "files": files, "download_bytes": 0, "local": folder}
    listed: dict[str, list[Any]] = {}
    download = 0
    for file in info.siblings or []:
        if _wanted(file.rfilename):
            listed[file.rfilename] = [file.size, file.lfs.sha256 if file.lfs else None]
            if not isinstance(try_to_load_from_cache(name, file.rfilename, revision=info.sha), str):
                download += file.size or 0
    return {"revision": info.sha, "files": listed, "download_bytes": download}


def _get(hub_id: str, found: dict[str, Any], workspace: str) -> None:
    """Into the cache, hashed, and linked into the workspace under `folder_of(hub_id)`."""
    from remote.agent import files as agent
    from remote.agent.manifest import digest_of
    from remote.agent.staging import publish, staged
    from remote.agent.standing import settle, staging_of, standing

    name = folder_of(hub_id)
    paths = sorted(found["files"])
    if not any(path.endswith(".safetensors") for path in paths):
        raise SurgvqaError(f"{hub_id}: no safetensors file in revision {found['revision']}; is it a checkpoint?")
    local = _downloaded(hub_id, found, paths)
    before = agent.read_record(workspace, name).get("files", {})

    def entry(path: str) -> list[Any]:
        real, told = local[path], found["files"][path][1]
        stat = os.stat(real)
        known = before.get(path, [None, None, None, None])
        same = (known[0], known[2]) == (stat.st_size, stat.st_mtime_ns)
        sha256 = known[1] if same else agent.sha256_of(real)
        if told not in (None, sha256):
            os.unlink(real)
            raise SurgvqaError(f"{hub_id}: {path} arrived damaged from the hub; run the upload again")
        return [path, stat.st_size, sha256, stat.st_mtime_ns, stat.st_mode & 0o777]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        entries = list(pool.map(entry, paths))
    digest = digest_of(name, "folder", entries)
    item = {"name": name, "kind": "folder", "digest": digest, "files": entries}
    state = standing(workspace, item)["state"]
    if state == "foreign":
        raise SurgvqaError(f"{name} exists in {workspace} and was not made by upload; move it away")
    if state == "complete":
        settle(workspace, item)
    else:
        for path in paths:
            target = staged(staging_of(workspace, digest), path)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            _link(local[path], target)
        publish(None, workspace, item)
    _say({"revision": found["revision"], "folder": name})


def _downloaded(hub_id: str, found: dict[str, Any], paths: list[str]) -> dict[str, str]:
    """Path -> the file in the cache; says meanwhile how many bytes are there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    if "local" in found:
        return {path: os.path.realpath(os.path.join(found["local"], path)) for path in paths}
    disable_progress_bars()
    name, revision = _split(hub_id)
    total = sum(size or 0 for size, _ in found["files"].values())
    _say({"done": total - found["download_bytes"], "total": total})
    first = hf_hub_download(name, paths[0], revision=revision)  # by its name, so that the cache can be asked offline
    blobs = os.path.dirname(os.path.realpath(first))
    free = shutil.disk_usage(blobs).free
    if found["download_bytes"] > free:
        raise SurgvqaError(
            f"{hub_id}: disk full: {found['download_bytes'] / 1e9:.2f} GB to come, {free / 1e9:.2f} GB free "
            f"in {blobs}; set HF_HOME in hosts.toml to a larger disk"
        )
    over = threading.Event()

    def report() -> None:
        while not over.wait(PROGRESS_S):
            with contextlib.suppress(OSError):  # a download that is done is renamed
                _say({"done": sum(e.stat().st_size for e in os.scandir(blobs) if e.is_file()), "total": total})

    teller = threading.Thread(target=report, daemon=True)
    teller.start()
    try:
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            got = list(pool.map(lambda path: hf_hub_download(name, path, revision=found["revision"]), paths))
    finally:
        over.set()
        teller.join()
    _say({"done": total, "total": total})
    return {path: os.path.realpath(file) for path, file in zip(paths, got)}


def _link(source: str, target: str) -> None:
    """A second name for the file; across file systems a symbolic one."""
    if os.path.lexists(target):
        os.unlink(target)
    try:
        os.link(source, target)
    except OSError:
        os.symlink(source, target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
