"""Compares the engine with the old way, from files to results: three epochs of training, and answers to every sample.

    python benchmarks/engine.py --data demo --work /tmp/engine            # real size; a GPU with 80 GB, 25 GB of disk
    python benchmarks/engine.py --data demo --work /tmp/engine --toy      # the demo's own small model, anywhere
    python benchmarks/engine.py … --only "train;old train" [-- --checkpointed_layers 14 …]   # and options of train

`--data` is a demo workspace, whose clips (enlarged to 1240x1080, with different noise in every frame), spoken
questions and tokenizer are used. The weights are random at real size, so losses and answers are meaningless. Parts:

    checkpoint   written once, then audited
    warm         2 steps of training, for the cost of compiling; fills the compiler's cache
    train        ours, 3 epochs, from an empty feature cache
    old train    benchmarks/old_way.py train on some samples; its time is extrapolated, because nothing is cached
    answer       `surgvqa evaluate`, from an empty feature cache
    old answer   benchmarks/old_way.py answer, some samples, one at a time; its time is extrapolated

Times are from files to results, without loading the model. Prints one JSON line for each part, then the ratios. Exit
code 1 if a ratio is below its goal (`--train_goal`, `--answer_goal`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 3
OLD_TRAINED, OLD_ANSWERED = 20, 8
"""Number of samples to measure the old way with; it takes equally long for each."""
PARTS = ("checkpoint", "warm", "train", "old train", "answer", "old answer")


def write_data(folder: Path, like: Path, count: int, size: tuple[int, int]) -> None:
    """Writes the first `count` samples of the demo `like`, each with its own frames of `size` pixels."""
    import numpy as np
    from PIL import Image

    rows = [json.loads(line) for line in (like / "train.jsonl").read_text().splitlines()[:count]]
    if len(rows) < count:
        raise SystemExit(f"{like / 'train.jsonl'}: {len(rows)} samples, expected at least {count}")

    def write_frames(number: int, row: dict[str, Any]) -> list[str]:
        noise, names = np.random.default_rng(number), []
        for place, frame in enumerate(row["frames"]):
            (found,) = (like / "frames").glob(f"*/{frame}.jpg")
            names.append(f"{row['video_id']}_{100 * number + place}")
            target = folder / "frames" / row["video_id"] / f"{names[-1]}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.asarray(Image.open(found).convert("RGB").resize(size, Image.Resampling.BICUBIC), np.int16)
            pixels = pixels + noise.integers(-6, 7, pixels.shape, dtype=np.int16)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target, quality=90)
        return names

    with ThreadPoolExecutor() as pool:  # numpy and Pillow release the lock
        for row, names in zip(rows, pool.map(write_frames, range(count), rows)):
            row["frames"] = names
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def surgvqa(*arguments: str, cwd: Path) -> dict[str, Any]:
    """Runs a command. Returns its JSON, its wall time, and the start and peak memory of each phase."""
    start = time.perf_counter()
    program = [sys.executable, "-m", "surgvqa", *arguments, "--json"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(program, cwd=cwd, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths})
    if not done.stdout.strip() or done.returncode:
        raise SystemExit(f"surgvqa {' '.join(arguments)}: exit code {done.returncode}")
    answer = json.loads(done.stdout)
    answer["wall_s"] = round(time.perf_counter() - start, 1)
    if "run" in answer:
        lines = (cwd / "runs" / answer["run"] / "events.jsonl").read_text().splitlines()
        answer |= from_events([json.loads(line) for line in lines])
    return answer


def from_events(events: list[dict[str, Any]]) -> dict[str, Any]:
    """encode_s (until the work begins), work_s (training or generating), first_step_s, and each phase's peak in GB."""
    began, peaks, phase, steps, worked = {}, {}, "", [], 0.0
    for event in events:
        if event["kind"] == "phase":
            phase = event["name"]
            began.setdefault(phase, event["t"])
        if event["kind"] == "memory":
            peaks[event["phase"]] = round(event.get("peak_allocated_bytes", 0) / 1e9, 2)
        if event["kind"] == "metric":
            steps.append(event["t"])
        if event["kind"] == "progress" and event["phase"] in ("train", "generate"):
            worked = event["t"]
    work = began.get("train", began.get("generate"))
    found = {"encode_s": work - began["encode"] if "encoded" in began else 0.0, "work_s": worked - work}
    if steps:
        found["first_step_s"] = steps[0] - began["train"]
    return {name: round(value, 2) for name, value in found.items()} | {"peak_gb_by_phase": peaks}


def extrapolated_seconds(found: dict[str, Any], samples: int) -> float:
    """Seconds that the old way would take for `samples` samples."""
    return found["first_s"] + found["s_per_sample"] * (samples - found["first"])


def old(part: str, options: dict[str, Any]) -> dict[str, Any]:
    """Runs benchmarks/old_way.py in a separate process."""
    program = [sys.executable, str(ROOT / "benchmarks" / "old_way.py"), part, json.dumps(options)]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Runs the parts one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="the demo's own model, 8 small samples")
    parser.add_argument("--samples", type=int, help="default: 64, toy 8")
    parser.add_argument("--answers", type=int, default=64, help="maximum number of samples to answer (64)")
    parser.add_argument(
        "--audio_span", default="full", choices=("full", "spoken"), help="of ours; the old way uses full"
    )
    parser.add_argument(
        "--train_goal", type=float, default=0.0, help="required speed in training, as a multiple of the old way's"
    )
    parser.add_argument("--answer_goal", type=float, default=0.0, help="the same for answering")
    parser.add_argument("--only", help=f"parts, separated by ; ({'; '.join(PARTS)})")
    parser.add_argument("train_options", nargs="*", help="further options of surgvqa train, after --")
    given = parser.parse_args()
    data, work = given.data.resolve(), given.work.resolve()
    parts = [part.strip() for part in given.only.split(";")] if given.only else list(PARTS)
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"--only {unknown}: expected some of {'; '.join(PARTS)}")
    like = data / "merged" if (data / "merged/config.json").is_file() else data / "stage1"
    checkpoint = like if given.toy else work / "checkpoint"
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}

    def say(part: str, found: dict[str, Any]) -> None:
        results[part] = found
        shown = {k: v for k, v in found.items() if k not in ("answers", "by_type", "confusion")}
        print(json.dumps({part: shown}), flush=True)

    count = given.samples or (8 if given.toy else 64)
    files = work / f"data-{count}"
    if not (files / "samples.jsonl").is_file():
        write_data(files, data, count, (168, 112) if given.toy else (1240, 1080))
    paths = {"frames_dir": str(files / "frames"), "audio_dir": str(data / "audio")}
    training = {
        "num_train_epochs": EPOCHS,
        "model_name_or_path": str(checkpoint),
        "train_data_path": str(files / "samples.jsonl"),
        **paths,
    }
    answers = min(count, given.answers)
    answering = {"checkpoint": str(checkpoint), **paths}
    shown = {"audio_span": given.audio_span}
    if given.toy:
        training |= {"image_size": 112}
        answering |= {"image_size": 112, "max_new_tokens": 8}

    def fresh(name: str) -> list[str]:
        shutil.rmtree(work / name, ignore_errors=True)
        return ["--feature_cache_dir", str(work / name)]

    def named(options: dict[str, Any]) -> list[str]:
        return [text for name, value in options.items() for text in (f"--{name}", str(value))]

    def first(count: int) -> str:
        few = files / f"first-{count}.jsonl"
        few.write_text("".join((files / "samples.jsonl").read_text().splitlines(keepends=True)[:count]))
        return str(few)

    quiet = ["--save_strategy", "no", *given.train_options]
    if "checkpoint" in parts:
        if not (checkpoint / "config.json").is_file():
            writer = [sys.executable, str(ROOT / "benchmarks/real_size.py"), str(checkpoint), "--like", str(like)]
            subprocess.run(writer, check=True)
        audit = surgvqa("audit", str(checkpoint), cwd=work)
        say("checkpoint", {k: audit.get(k) for k in ("ok", "tensors", "dtypes", "wall_s")})
    if "warm" in parts:
        changed = named(training | shown | {"train_data_path": first(8)})
        say("warm", surgvqa("train", *changed, "--max_steps", "2", *fresh("warm"), *quiet, cwd=work))
    if "train" in parts:
        say("train", surgvqa("train", *named(training | shown), *fresh("cache"), *quiet, cwd=work))
    if "old train" in parts:
        found = old("train", training | {"train_data_path": first(OLD_TRAINED), "num_train_epochs": 1})
        say("old train", found | {"seconds": extrapolated_seconds(found, count * EPOCHS)})
    if "answer" in parts:
        changed = named(answering | shown | {"eval_data_path": first(answers)})
        say("answer", surgvqa("evaluate", *changed, *fresh("eval"), cwd=work))
    if "old answer" in parts:
        found = old("answer", answering | {"eval_data_path": first(OLD_ANSWERED)})
        say("old answer", found | {"seconds": extrapolated_seconds(found, answers)})
    missed = False
    for part, goal in (("train", given.train_goal), ("answer", given.answer_goal)):
        if part in results and f"old {part}" in results:
            ours, before = results[part]["encode_s"] + results[part]["work_s"], results[f"old {part}"]["seconds"]
            verdict = f", goal {goal:g} {'missed' if before / ours < goal else 'met'}" if goal else ""
            print(f"{part}: old {before:.1f} s, ours {ours:.1f} s, ratio {before / ours:.2f}{verdict}", flush=True)
            missed |= before / ours < goal
        elif goal:
            print(f"{part}: goal {goal:g} not looked at: --only leaves a part of it out", flush=True)
            missed = True
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
