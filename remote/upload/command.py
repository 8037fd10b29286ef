"""`surgvqa-remote upload HOST`: plan, send, verify, publish; and merge there when that is cheaper."""

from __future__ import annotations

import time
from typing import Any

from rich.filesize import decimal as human_bytes

from remote.jobs import follower, launch
from remote.ssh.connection import Remote, connect
from remote.ssh.hosts import resolve
from remote.ssh.process import Reserve, best_ciphers
from remote.upload import hub
from remote.upload.hashes import Hashes, Item
from remote.upload.host_settings import host_settings
from remote.upload.options import UploadOptions
from remote.upload.plan import (
    Way,
    checkpoint_ways,
    compare,
    data_sources,
    known_rate,
    plan_table,
    public,
)
from remote.upload.send import send_item
from surgvqa.config.settings import Path_, settings_of
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run
from surgvqa.runs.reporter import Reporter
from surgvqa.terminal.figures import human_seconds
from surgvqa.untrusted import one_line

AHEAD = 3  # connections that every upload needs: two streams, and one for the hashes


def fill_in(options: UploadOptions, workspace: Workspace) -> None:
    """What was not named comes from surgvqa.toml (any command's table)."""
    tables = (None, "train", "merge", "evaluate")
    for name, setting in settings_of(UploadOptions).items():
        if setting.type is Path_ and getattr(options, name) is None:
            values = (workspace.value(name, table) for table in tables)
            setattr(options, name, next((v for v in values if v is not None), None))
    options.stage1_hub_id = options.stage1_hub_id or workspace.value("stage1_hub_id", "host")


def check(options: UploadOptions, workspace: Workspace) -> None:
    """Everything that can be seen from here, before the host is asked."""
    fill_in(options, workspace)
    checkpoints = options.model_name_or_path, options.stage1_model_path, options.stage1_hub_id
    if not any((options.train_data_path, options.eval_data_path, *checkpoints)):
        raise UsageError("nothing to upload: name --model_name_or_path, --train_data_path, … or make a surgvqa.toml")
    wanted = {
        "merged": ["model_name_or_path"],
        "adapter": ["stage1_model_path", "stage2_adapter_path"],
        "hub": ["stage1_hub_id", "stage2_adapter_path"],
    }
    for name in wanted.get(options.what, []):
        if not getattr(options, name):
            raise UsageError(f"--what {options.what} needs --{name}")
    if options.stage1_hub_id:
        hub.check_id(options.stage1_hub_id)


def upload(options: UploadOptions, run: Run, workspace: Workspace, host: str, accept_new_host_key: bool) -> Outcome:
    """The whole job; events go to `run`."""
    began = time.monotonic()
    settings = host_settings(workspace)
    run.phase("connect", host)
    target = resolve(host, workspace.root)
    # Most hosts have AES hardware: the streams' connections are made while ours is, and while the plan is made.
    reserve = Reserve(target, best_ciphers(target, True), 0 if options.dry_run else AHEAD)
    remote = None
    try:
        remote = connect(target, workspace.root, accept_new_host_key)
        facts = remote.ask("probe", venv=remote.host.entry.venv)
        if not facts["writable"]:
            raise SurgvqaError(f"{host}: cannot write in {facts['workspace']}; set workspace in hosts.toml")
        if not facts["aes"]:
            reserve.close()
            reserve = Reserve(target, best_ciphers(target, False))
        hashes = Hashes(checksum=options.checksum)
        ways = checkpoint_ways(options, workspace, hashes, run)
        sources = data_sources(options, workspace)
        data = [Item("data", "files", hashes.entries(sources))] if sources else []
        plan = compare(remote, ways, data, options.checksum)
        show = plan_table(host, plan)
        run.emit("plan", **{k: plan[k] for k in ("ways", "data", "chosen", "bytes_per_s", "free_bytes")})
        if options.dry_run:
            return Outcome(public(plan), show=show)
        chosen: Way | None = plan["way"]
        if chosen and chosen.hub_id:
            hub.get(remote, chosen.hub_id, run, options.patience_s)
        sent = [
            send_item(remote, item, run, hashes, facts, reserve, streams=options.streams, patience_s=options.patience_s)
            for item in [*(chosen.items if chosen else []), *data]
        ]
        deleted = retire(remote, data, plan["data"], options.delete, run)
        remote.ask("settings", text=settings)
        merged_there = None
        if chosen and chosen.output:
            merged_there = merge_there(remote, chosen, run)
    finally:
        reserve.close()
        if remote:
            remote.close()
    total, seconds = sum(s["sent_bytes"] for s in sent), sum(s["seconds"] for s in sent)
    if total > 64e6:
        known_rate(host, total / seconds)
    data_out = {
        **public(plan),
        "items": sent,
        "sent_bytes": total,
        "seconds": time.monotonic() - began,
        "deleted": deleted,
        "merged_on_host": merged_there,
    }

    def tell(console: Any) -> None:
        rate = f", {human_bytes(int(total / max(seconds, 1e-9)))}/s" if total else ""
        console.print(f"{host}: {human_bytes(total)} sent in {human_seconds(seconds)}{rate}; all files verified")
        if merged_there and merged_there.get("already_there"):
            console.print(f"{merged_there['output']}: merged there before from the same folders")

    return Outcome(data_out, show=tell)


NAMED = 5  # stale files that a message spells out


def retire(remote: Remote, data: list[Item], there: dict[str, Any], delete: bool, run: Reporter) -> list[str]:
    """Removes data files on the host that this upload no longer holds, and names those that stay; what was removed.

    Without `delete` only files that one of another extension has replaced: the host would find both.
    """
    names: list[str] = []
    if there["stale_files"] and (delete or there["replaced"]):
        for item in data:
            answer = remote.ask("retire", item=item.wire(), everything=delete)
            names += answer["removed"]
            if answer["changed"]:
                run.warning(f"changed there since, so not removed: {_some(answer['changed'], len(answer['changed']))}")
    left = [path for path in there["stale"] if path not in names]
    if left and not delete:
        count = there["stale_files"] - len(names)
        run.warning(f"sent once and no longer part of this upload: {_some(left, count)}; --delete removes them there")
    return names


def _some(paths: list[str], count: int) -> str:
    more = f" and {count - NAMED} more" if count > NAMED else ""
    return one_line(", ".join(paths[:NAMED]) + more)


def merge_there(remote: Remote, way: Way, run: Reporter) -> dict[str, Any]:
    """Has the host merge, unless it did so before with the same inputs; the merge's events pass through `run`."""
    names, host = way.merge(), remote.host.name
    if remote.ask("merged", **names)["same"]:
        run.phase("merge", f"{way.output}: merged on {host} before, from the same {way.stage1} and {names['adapter']}")
        return {"state": "finished", "already_there": True, "output": way.output}
    argv = ["--stage1_model_path", names["stage1"], "--stage2_adapter_path", names["adapter"]]
    run.phase("merge", f"on {host}")
    needs = [names["stage1"], names["adapter"]]
    launched = launch.launch(remote, "merge", [*argv, "--output_path", way.output], needs=needs, exclusive=False)
    answer = follower.wait(remote, launched["run"], run)
    remote.ask("note_merge", **names)
    return answer
