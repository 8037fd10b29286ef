"""What `surgvqa-remote upload` may be asked, in the same form as surgvqa/config.py's options."""

from __future__ import annotations

from dataclasses import dataclass

from remote.ssh.patience import PATIENCE_HELP, PATIENCE_S
from surgvqa.config.settings import Path_, option


@dataclass(kw_only=True)
class UploadOptions:
    """What to send to the host. Paths that are not given come from surgvqa.toml."""

    model_name_or_path: Path_ | None = option(None, "merged BF16 checkpoint folder")
    stage1_model_path: Path_ | None = option(None, "Stage-1 checkpoint folder")
    stage1_hub_id: str | None = option(
        None, "Stage 1 on the Hugging Face hub, USER/NAME or USER/NAME@REVISION: the host may get it itself"
    )
    stage2_adapter_path: Path_ | None = option(None, "Stage-2 adapter folder")
    output_path: Path_ | None = option(None, "the merged checkpoint's name on the host when it is merged there")
    train_data_path: Path_ | None = option(None, "JSONL file of training samples")
    eval_data_path: Path_ | None = option(None, "JSONL file of evaluation samples")
    frames_dir: Path_ | None = option(None, "folder of frames; only those that the JSONL files name are sent")
    audio_dir: Path_ | None = option(None, "folder of spoken questions; only those needed are sent")
    eval_audio_dir: Path_ | None = option(None, "folder of spoken evaluation questions (default: audio_dir)")
    what: str = option(
        "auto",
        "the checkpoint by the cheapest way, whole (merged), as Stage 1 + adapter merged there, with Stage 1 from the "
        "hub, or only the data",
        choices=("auto", "merged", "adapter", "hub", "data"),
    )
    streams: int = option(0, "parallel streams; 0 = as many as the link rewards, found while it runs")
    checksum: bool = option(False, "read every file on both sides again, whatever sizes and times say")
    delete: bool = option(False, "remove data files there that were uploaded once and are not part of this upload")
    dry_run: bool = option(False, "show the plan: what, how large, how long; send nothing")
    patience_s: float = option(PATIENCE_S, PATIENCE_HELP, least=0)
