"""The engine at real size: a checkpoint of 8.93 B random weights on disk, then `surgvqa train` and `evaluate` on it.

    python benchmarks/engine.py --data demo --work /tmp/engine

`--data` is a demo workspace (its clips, spoken questions and tokenizer are used; its small weights are not). Prints one
JSON line a command: what it measured, and the peak of each phase. The loss means nothing: the weights are random.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

TOKEN_IDS = ("image_token_id", "video_token_id", "audio_token_id", "vision_start_token_id", "vision_end_token_id",
             "bos_token_id", "eos_token_id")  # fmt: skip


def write_checkpoint(folder: Path, like: Path) -> None:
    """17.9 GB of random weights under the old key names, with the tokenizer and the token ids of the small `like`."""
    import real_size

    folder.mkdir(parents=True, exist_ok=True)
    for file in like.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, folder / file.name)
    small = json.loads((like / "config.json").read_text())
    model = real_size.build()
    model.save_pretrained(folder, max_shard_size="5GB")
    config = {**real_size.CONFIG, **{k: small[k] for k in TOKEN_IDS if k in small}}
    config.pop("audio_projector_bias")
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def surgvqa(*arguments: str, cwd: Path) -> dict[str, Any]:
    """Runs a command; its JSON, its wall time, and the fullest moment of each phase."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "surgvqa", *arguments, "--json"], cwd=cwd, stdout=subprocess.PIPE)
    answer = json.loads(done.stdout) if done.stdout.strip() else {"exit_code": done.returncode}
    answer["wall_s"] = round(time.perf_counter() - start, 1)
    if "run" in answer:
        phase, peaks, began, last = "", {}, {}, 0.0
        for line in (cwd / "runs" / answer["run"] / "events.jsonl").read_text().splitlines():
            event = json.loads(line)
            if event["kind"] == "phase":
                phase = event["name"]
                began.setdefault(phase, event["t"])
            if event["kind"] == "gpu" and event.get("allocated_bytes"):
                peaks[phase] = max(peaks.get(phase, 0), round(event["allocated_bytes"] / 1e9, 2))
            last = event["t"]
        answer["sampled_gb_by_phase"] = peaks
        starts = [*began.values(), last]
        answer["phase_s"] = {n: round(starts[i + 1] - starts[i], 1) for i, n in enumerate(began)}
    return answer


def main() -> None:
    """Checkpoint (once), then the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("train_options", nargs="*", help="further options of surgvqa train, after --")
    arguments = parser.parse_args()
    data, work = arguments.data.resolve(), arguments.work.resolve()
    checkpoint = work / "checkpoint"
    if not (checkpoint / "config.json").is_file():
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path[:2]!r}; import engine; "
                        f"from pathlib import Path; engine.write_checkpoint(Path({str(checkpoint)!r}), "
                        f"Path({str(data / 'stage1')!r}))"], check=True)  # fmt: skip
        print(json.dumps({"checkpoint_s": round(time.perf_counter() - start, 1)}), flush=True)
    audit = surgvqa("audit", str(checkpoint), cwd=work)
    print(json.dumps({k: audit.get(k) for k in ("ok", "tensors", "dtypes", "problems", "wall_s")}), flush=True)
    paths = ["--frames_dir", str(data / "frames"), "--audio_dir", str(data / "audio")]
    paths += ["--eval_data_path", str(data / "eval.jsonl"), "--feature_cache_dir", str(work / "cache")]
    trained = surgvqa("train", "--model_name_or_path", str(checkpoint), "--train_data_path", str(data / "train.jsonl"),
                      *paths, *arguments.train_options, cwd=work)  # fmt: skip
    print(json.dumps({"train": trained}), flush=True)
    if trained.get("adapter"):
        answer = surgvqa("evaluate", "--checkpoint", trained["adapter"], *paths, cwd=work)
        answer.pop("by_type", None)
        print(json.dumps({"evaluate": answer}), flush=True)


if __name__ == "__main__":
    main()
