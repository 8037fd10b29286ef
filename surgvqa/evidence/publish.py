"""`surgvqa publish`: uploads weights and their card to the Hugging Face hub. Asks once; sends no data. Light to import.

huggingface_hub manages the hub's address and login (HF_ENDPOINT, HF_TOKEN, hf auth login); we store neither.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from surgvqa.config.options import PublishOptions
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError, UsageError, first_line
from surgvqa.evaluation.model_folders import ADAPTER_CONFIG
from surgvqa.evidence.pack import CARD, MANIFEST, outputs_of
from surgvqa.files import read_json, read_text
from surgvqa.machine.packages import require_installed
from surgvqa.outcome import Outcome
from surgvqa.provenance.hashes import Hashes, weight_files
from surgvqa.runs.history import find_run
from surgvqa.runs.state import read_run_json

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check(options: PublishOptions) -> None:
    """Raises UsageError for what would fail after the user has agreed."""
    if not REPO.fullmatch(options.repo):
        raise UsageError(f"repo is {options.repo!r}, expected USER/NAME")
    if options.base_model and not REPO.fullmatch(options.base_model):
        raise UsageError(f"base_model is {options.base_model!r}, expected USER/NAME")
    if not (Path(options.evidence) / CARD).is_file():
        raise UsageError(f"{options.evidence}: has no {CARD}; make it first: surgvqa evidence RUN… --output DIR")
    require_installed("publish", ["huggingface_hub"], "hub")


def run(options: PublishOptions, workspace: Workspace) -> Outcome:
    """Asks, then creates the repository if needed and uploads weights and card in one commit."""
    folder = _folder(options.source, workspace)
    _require_evidence_of(folder, Path(options.evidence))
    files = _files(folder, options)
    size = sum(content.stat().st_size if isinstance(content, Path) else len(content) for content in files.values())
    kind = "public: everybody can read it" if options.public else "private if it is new"
    listed = f"{len(files)} files, {size / 1e9:.2f} GB ({', '.join(sorted(files))}), to {options.repo} ({kind})"
    if not options.yes and not _user_agrees(listed):
        return Outcome({"sent": False, "repo": options.repo}, ok=False, show=lambda c: c.print("nothing was sent"))
    url = _send(files, options)
    data = {"sent": True, "repo": options.repo, "url": url, "files": sorted(files), "bytes": size}
    return Outcome(data, show=lambda console: console.print(f"{len(files)} files are at {url}", markup=False))


def _folder(source: str, workspace: Workspace) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir() or (folder / "run.json").is_file():
        run = find_run(source, workspace.runs_dirs, "train")
        weights = outputs_of(read_run_json(run), run).get("weights")
        if weights is None:
            raise UsageError(f"{run.name}: its weights are not on this machine, expected a run of train or merge")
        folder = Path(weights["path"])
    if not any(file.suffix == ".safetensors" for file in weight_files(folder)):
        raise UsageError(f"{folder}: has no *.safetensors file, expected an adapter or a checkpoint")
    return folder


def _require_evidence_of(folder: Path, evidence: Path) -> None:
    """Raises UsageError when the card describes other weights."""
    runs = read_json(evidence / MANIFEST).get("runs")
    known: set[str] = set()
    for entry in runs if isinstance(runs, list) else []:
        for row in [*(entry.get("outputs") or {}).values(), *(entry.get("inputs") or {}).values()]:
            known.add(str(row.get("sha256")))
    if Hashes().of_weights(folder) not in known:
        raise UsageError(f"{folder}: the card in {evidence} describes other weights; pack the evidence of these first")


def _files(folder: Path, options: PublishOptions) -> dict[str, Path | bytes]:
    """{name on the hub: local file or content} of weights, configuration, tokenizer and card."""
    files: dict[str, Path | bytes] = {file.name: file for file in weight_files(folder)}
    files[CARD] = _card(Path(options.evidence) / CARD, options.base_model).encode()
    if ADAPTER_CONFIG in files:  # a local path is useless on the hub, and private
        config = read_json(folder / ADAPTER_CONFIG)
        base = str(config.get("base_model_name_or_path") or "")
        config["base_model_name_or_path"] = options.base_model or (base if not Path(base).is_dir() else Path(base).name)
        files[ADAPTER_CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
    return files


def _card(file: Path, base_model: str | None) -> str:
    """The packed card, with the base checkpoint's name if given."""
    text = read_text(file)
    if base_model is None:
        return text
    from huggingface_hub import ModelCard

    card = ModelCard(text)
    setattr(card.data, "base_model", base_model)  # noqa: B010  (CardData accepts any name and declares none)
    return str(card)


def _user_agrees(listed: str) -> bool:
    """Asks the user once, on the terminal."""
    if not sys.stdin.isatty():
        raise UsageError(f"would send {listed}; use --yes, because there is no terminal to ask on")
    print(f"Send {listed}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _send(files: dict[str, Path | bytes], options: PublishOptions) -> str:
    """Uploads the files and returns the repository's URL. Raises SurgvqaError for any error of hub or network."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    hub = HfApi()
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in sorted(files.items())
    ]
    try:
        url = hub.create_repo(options.repo, private=not options.public, exist_ok=True)
        hub.create_commit(options.repo, operations, commit_message="Weights and model card, by surgvqa publish")
    except Exception as error:  # HTTP errors of two libraries, and the hub's errors
        raise SurgvqaError(f"{options.repo}: the hub refused it: {first_line(error)}") from None
    return str(url)
