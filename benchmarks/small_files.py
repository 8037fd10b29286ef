"""Compares uploading 22,500 small files with rsync, alternately: first upload, nothing changed, and that at 1 Mbit/s.

    python benchmarks/small_files.py [--rounds 3] [--bytes 2000] [--out FILE.json]

Needs root, openssh-server, rsync, iproute2 and a C compiler. Laptop and host are two network namespaces on this
machine, joined by a veth pair (whose counters give the bytes each way) or, in the third case, by benchmarks/link.c (1
Mbit/s, 20 ms). Times are wall times of the whole command: `rsync -a` of the data, and `surgvqa-remote upload --what
data`, which reads the JSONL file and sends the files that it names.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/kits"), str(ROOT / "benchmarks")]

from sshd import Sshd  # noqa: E402
from upload import ADDRESSES, SPACES, ip, link, same  # noqa: E402

VIDEOS, CLIPS, FRAMES = 100, 25, 8  # 100 x 25 x (8 frames and a question) = 22,500 files


def make_data(workspace: Path, size: int) -> None:
    """Writes frames and questions of `size` random bytes, and the JSONL file that names them."""
    lines = []
    for video in range(VIDEOS):
        name = f"v{video:03}"
        for folder in ("frames", "audio"):
            (workspace / folder / name).mkdir(parents=True)
        for clip in range(CLIPS):
            frames = [f"{name}_{clip * FRAMES + i:06}" for i in range(FRAMES)]
            for frame in frames:
                (workspace / "frames" / name / f"{frame}.jpg").write_bytes(os.urandom(size))
            with wave.open(str(workspace / "audio" / name / f"q{clip}.wav"), "wb") as sound:
                sound.setparams((1, 2, 16000, 0, "NONE", ""))
                sound.writeframes(os.urandom(size))
            common = {"question": f"Is it {clip}?", "question_type": "t", "answer": "Yes it is.", "short_answer": "yes"}
            lines.append(json.dumps({"id": f"q{clip}", "video_id": name, "frames": frames, **common}))
    (workspace / "train.jsonl").write_text("\n".join(lines) + "\n")
    (workspace / "surgvqa.toml").write_text(
        'train_data_path = "train.jsonl"\nframes_dir = "frames"\naudio_dir = "audio"\n'
    )


@contextlib.contextmanager
def cable() -> Iterator[tuple[list[str], list[str]]]:
    """Two namespaces joined by a veth pair, whose speed only the processors limit."""
    inside = [["ip", "netns", "exec", space] for space in SPACES]
    for space in SPACES:
        ip("netns", "add", space)
    try:
        ip("link", "add", "link0", "netns", SPACES[0], "type", "veth", "peer", "name", "link0", "netns", SPACES[1])
        for words, address in zip(inside, ADDRESSES):
            subprocess.run([*words, "ip", "link", "set", "lo", "up"], check=True)
            subprocess.run([*words, "ip", "addr", "add", f"{address}/30", "dev", "link0"], check=True)
            subprocess.run([*words, "ip", "link", "set", "link0", "up"], check=True)
        yield inside[0], inside[1]
    finally:
        for space in SPACES:
            ip("netns", "del", space)


def passed(client: list[str]) -> tuple[int, int]:
    """(bytes sent, bytes received) by the laptop."""
    folder = "/sys/class/net/link0/statistics"
    words = [*client, "cat", f"{folder}/tx_bytes", f"{folder}/rx_bytes"]
    up, down = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    return int(up), int(down)


def timed(client: list[str], words: list[str], workspace: Path, environment: dict[str, str]) -> dict[str, float]:
    before, began = passed(client), time.monotonic()
    done = subprocess.run([*client, *words], cwd=workspace, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - began
    if done.returncode:
        sys.exit(f"{words[0]}: {done.stderr}")
    after = passed(client)
    return {"seconds": seconds, "up_bytes": after[0] - before[0], "down_bytes": after[1] - before[1]}


def measure(root: Path, binary: Path, rounds: int) -> list[dict]:
    workspace, found = root / "ws", []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(root / "home")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as for an installed program, which is compiled once
    environment["PYTHONPYCACHEPREFIX"] = str(root / "bytecode")
    (root / "home").mkdir()
    upload = [sys.executable, "-m", "remote", "upload", "gpuhost", "--what", "data", "--json"]

    def run(case: str, made: contextlib.AbstractContextManager, server: Sshd) -> None:
        with made as (client, host):
            server.start(host)
            try:
                environment["SURGVQA_SSH_CONFIG"] = str(server.config)
                rsync = ["rsync", "-a", "-e", f"ssh -F {server.config}", "frames", "audio", "train.jsonl"]
                rsync.append(f"gpuhost:{server.home}/rsync/")
                for _ in range(rounds):
                    if case == "first":
                        shutil.rmtree(server.home / "rsync", ignore_errors=True)
                        shutil.rmtree(server.home / "surgvqa", ignore_errors=True)
                        shutil.rmtree(root / "home/.cache", ignore_errors=True)
                    theirs = timed(client, rsync, workspace, environment)
                    ours = timed(client, upload, workspace, environment)
                    found.append({"case": case, "rsync": theirs, "ours": ours, "load": os.getloadavg()[0]})
                    print(json.dumps(found[-1]), flush=True)
                    assert same(workspace / "frames", server.home / "surgvqa/frames")
            finally:
                server.stop()

    server = Sshd(root / "host", address=ADDRESSES[1])
    server.trust()
    (workspace / "hosts.toml").write_text(f'[gpuhost]\npython = "{sys.executable}"\n')
    run("first", cable(), server)
    run("unchanged", cable(), server)
    run("unchanged, 1 Mbit/s", link(binary, 20, 1, 0), server)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bytes", type=int, default=2000, help="size of each file")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    if os.getuid() != 0:
        sys.exit("benchmarks/small_files.py: needs root for network namespaces")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # avoids the disk
        root = Path(folder)
        binary = root / "link"
        subprocess.run(["cc", "-O2", "-o", str(binary), str(ROOT / "benchmarks" / "link.c")], check=True)
        (root / "ws").mkdir()
        make_data(root / "ws", arguments.bytes)
        rows = measure(root, binary, arguments.rounds)
    print("| case | rsync s | ours s | ratio | rsync MB up, down | ours MB up, down | ratio of bytes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case in dict.fromkeys(row["case"] for row in rows):

        def median(who: str, key: str, case: str = case) -> float:
            return statistics.median(row[who][key] for row in rows if row["case"] == case)

        seconds = [median(who, "seconds") for who in ("rsync", "ours")]
        up, down = ([median(who, key) / 1e6 for who in ("rsync", "ours")] for key in ("up_bytes", "down_bytes"))
        print(
            f"| {case} | {seconds[0]:.2f} | {seconds[1]:.2f} | {seconds[1] / seconds[0]:.2f} "
            f"| {up[0]:.2f}, {down[0]:.2f} | {up[1]:.2f}, {down[1]:.2f} | {(up[1] + down[1]) / (up[0] + down[0]):.2f} |"
        )
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
