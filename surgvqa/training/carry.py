"""A saved state that lies on rank 0's machine, where the ranks of other machines can read it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from surgvqa.errors import SurgvqaError
from surgvqa.runs.ranks import Ranks

CARRIED = "from-rank-0"
"""Folder, in a run's, of copies of saved states that lie on another machine."""
CHUNK = 64 << 20
"""Bytes that travel at once."""


def carry(folder: Path, ranks: Ranks, device: torch.device, place: Path) -> Path:
    """`folder` of rank 0's machine as this rank can read it: `folder` itself there and on a shared disk, else a copy in
    `place`, made anew. All ranks come here. SurgvqaError on all of them when one machine cannot write its copy."""
    if not ranks.hosts:
        return folder
    listed: list[Any] = ranks.share(_files(folder) if ranks.rank == 0 else None, "saved state")[0]
    readable = ranks.share(ranks.node == 0 or _files(folder) == listed, "readable")
    if all(readable):
        return folder
    copy, problem = place / folder.name, ""
    writes = ranks.leads and not readable[ranks.rank]
    try:
        if writes:
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir(parents=True)
    except OSError as error:
        problem = f"{copy}: {error.strerror}"
    for name, size, _ in listed:
        found = _carry_file(folder / name, copy / os.path.basename(name) if writes and not problem else None, size,
                            ranks.rank == 0, device)  # fmt: skip
        problem = problem or found
    for rank, said in enumerate(ranks.share(problem, "carried")):
        if said:
            raise SurgvqaError(f"{ranks.name(rank)}{ranks.hosts[rank]}: {said}")
    return folder if readable[ranks.rank] else copy


def _files(folder: Path) -> list[list[Any]]:
    """Name, size and time of each file: alike on two machines only where the disk is one."""
    if not folder.is_dir():
        return []
    stats = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _carry_file(source: Path, target: Path | None, size: int, sends: bool, device: torch.device) -> str:
    """Rank 0's `source` to all; into `target`, where there is one. What went wrong here, or ''."""
    import torch.distributed as dist

    problem = ""
    for begin in range(0, size, CHUNK):
        count = min(CHUNK, size - begin)
        content = bytearray(count)  # sent also where reading fails: the other ranks wait for it
        try:
            if sends and not problem:
                with open(source, "rb") as file:
                    file.seek(begin)
                    if file.readinto(content) < count:
                        problem = f"{source}: has become shorter"
        except OSError as error:
            problem = f"{source}: {error.strerror}"
        block = torch.frombuffer(content, dtype=torch.uint8).to(device)
        dist.broadcast(block, 0)
        try:
            if target and not problem:
                with open(target, "ab") as copied:
                    copied.write(block.cpu().numpy().tobytes())
        except OSError as error:
            problem = f"{target}: {error.strerror}"
    if target and not size and not problem:
        target.touch()
    return problem
