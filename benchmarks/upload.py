"""Compares the upload with `scp -r`, alternately in one run, over loopback and three links between network namespaces.

    python benchmarks/upload.py [--rounds 3] [--links loopback,lan,wan,lossy] [--out FILE.json]

Needs root, openssh-server, iproute2 and a C compiler. benchmarks/link.c makes the links over TUN devices (the only way
on kernels without netem), with the kernel's own TCP and cubic. Both sides run on this machine, so the processor is the
limit on fast links. Times are wall times of the whole command: `scp -r`, and `surgvqa-remote upload` with start,
connection, plan, transfer, hashing on the host and publication. The source's hashes are known from the merge report,
as after `surgvqa merge`. The column "sending" excludes start and plan.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/kits")]

from sshd import Sshd  # noqa: E402

from remote.upload.hashes import Hashes  # noqa: E402
from remote.upload.plan import folder_sources  # noqa: E402

LINKS = {  # name: (text, round trip ms, Mbit/s, loss %, MB to send, target)
    "loopback": ("loopback", None, None, None, 3000, 1.7),
    "lan": ("20 ms, 1 Gbit/s", 20, 1000, 0, 2000, 1.3),
    "wan": ("80 ms, 200 Mbit/s", 80, 200, 0, 400, None),
    "lossy": ("80 ms, 200 Mbit/s, 0.1 % loss", 80, 200, 0.1, 100, 4.0),
}
SPACES = (f"surgvqa-laptop-{os.getpid()}", f"surgvqa-host-{os.getpid()}")
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def link(binary: Path, round_trip_ms: float, mbit: float, loss: float):
    """Two namespaces with this link between them."""
    for space in SPACES:
        ip("netns", "add", space)
    words = [str(binary), *SPACES, str(round_trip_ms), str(mbit), str(loss)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        for space, address in zip(SPACES, ADDRESSES):
            inside = ["ip", "netns", "exec", space]
            for more in (
                ["ip", "link", "set", "lo", "up"],
                ["ip", "addr", "add", f"{address}/30", "dev", "link0"],
                ["ip", "link", "set", "link0", "up", "mtu", "1500", "txqueuelen", "2000"],
                ["ip", "route", "replace", "10.213.7.0/30", "dev", "link0", "congctl", "cubic"],
            ):
                subprocess.run([*inside, *more], check=True)
        yield ["ip", "netns", "exec", SPACES[0]], ["ip", "netns", "exec", SPACES[1]]
    finally:
        process.kill()
        process.wait()
        for space in SPACES:
            ip("netns", "del", space)


def make_source(folder: Path, megabytes: int) -> None:
    """Writes shards of random bytes and a merge report with their hashes."""
    folder.mkdir(parents=True)
    shards = 4
    for number in range(shards):
        with open(folder / f"model-{number}.safetensors", "wb") as file:
            for _ in range(megabytes // shards):
                file.write(os.urandom(1_000_000))
    (folder / "config.json").write_text("{}")
    entries = Hashes(folder.parent / "none.json").entries(folder_sources(folder))
    report = {"shards": {e.path: {"sha256": e.sha256} for e in entries if e.path.endswith(".safetensors")}}
    (folder / "merge_report.json").write_text(json.dumps(report))


def same(one: Path, other: Path) -> bool:
    return subprocess.run(["diff", "-rq", str(one), str(other)], stdout=subprocess.DEVNULL).returncode == 0


def measure(name: str, rounds: int, root: Path, binary: Path) -> dict:
    text, round_trip, mbit, loss, megabytes, target = LINKS[name]
    here = root / name
    workspace = here / "ws"
    make_source(workspace / "merged", megabytes)
    made = contextlib.nullcontext(([], [])) if round_trip is None else link(binary, round_trip, mbit, loss)
    times: dict[str, list[float]] = {"scp": [], "ours": [], "sending": []}
    details = []
    with made as (client, host):
        server = Sshd(here / "host", address="127.0.0.1" if not host else ADDRESSES[1])
        server.start(host)
        try:
            server.trust()
            (workspace / "hosts.toml").write_text(f'[gpuhost]\npython = "{sys.executable}"\n')
            environment = {
                **os.environ,
                "SURGVQA_SSH_CONFIG": str(server.config),
                "PYTHONPATH": str(ROOT),
                "HOME": str(here / "home"),
            }
            (here / "home").mkdir()
            there = server.home / "surgvqa"
            for _ in range(rounds):
                began = time.monotonic()
                words = ["scp", "-q", "-r", "-F", str(server.config), "merged", f"gpuhost:{server.home}/scp"]
                subprocess.run([*client, *words], cwd=workspace, check=True)
                times["scp"].append(time.monotonic() - began)
                assert same(workspace / "merged", server.home / "scp")
                shutil.rmtree(server.home / "scp")

                began = time.monotonic()
                words = [
                    sys.executable,
                    "-m",
                    "remote",
                    "upload",
                    "gpuhost",
                    "--model_name_or_path",
                    "merged",
                    "--json",
                ]
                done = subprocess.run(
                    [*client, *words], cwd=workspace, env=environment, check=True, capture_output=True, text=True
                )
                times["ours"].append(time.monotonic() - began)
                item = json.loads(done.stdout)["items"][0]
                times["sending"].append(item["seconds"])
                details.append({"streams": item["streams"], "probed": item.get("probed")})
                assert same(workspace / "merged", there / "merged")
                shutil.rmtree(there)
                print(name, {k: round(v[-1], 2) for k, v in times.items()}, details[-1], os.getloadavg(), flush=True)
        finally:
            server.stop()
    size = sum(f.stat().st_size for f in (workspace / "merged").iterdir()) / 1e6
    median = {k: statistics.median(v) for k, v in times.items()}
    shutil.rmtree(here)
    return {
        "link": text,
        "megabytes": size,
        "seconds": times,
        "scp_mb_s": size / median["scp"],
        "ours_mb_s": size / median["ours"],
        "sending_mb_s": size / median["sending"],
        "ratio": median["scp"] / median["ours"],
        "pairwise_ratios": [a / b for a, b in zip(times["scp"], times["ours"])],
        "target": target,
        "details": details,
        "load": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--links", default=",".join(LINKS))
    parser.add_argument("--out")
    arguments = parser.parse_args()
    if os.getuid() != 0:
        sys.exit("benchmarks/upload.py: needs root for network namespaces")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # avoids the disk
        root = Path(folder)
        binary = root / "link"
        subprocess.run(["cc", "-O2", "-o", str(binary), str(ROOT / "benchmarks" / "link.c")], check=True)
        rows = [measure(name, arguments.rounds, root, binary) for name in arguments.links.split(",")]
    print("| link | MB | `scp -r` MB/s | ours MB/s | sending alone | ratio | target | streams |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        streams = "/".join(str(d["streams"]) for d in row["details"])
        target = f"≥ {row['target']}" if row["target"] else "–"
        print(
            f"| {row['link']} | {row['megabytes']:.0f} | {row['scp_mb_s']:.1f} | {row['ours_mb_s']:.1f} "
            f"| {row['sending_mb_s']:.1f} | {row['ratio']:.2f} | {target} | {streams} |"
        )
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
