"""Where Python caches the compiled modules of large packages, if it cannot do so beside them.

A training imports 2,600 modules of torch and transformers when it starts. Compiling them took 8 s at every start on a
GPU machine where site-packages belonged to root and held no compiled modules. Standard library only.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from surgvqa.files import user_folder

LARGE = ("torch", "transformers")


def uncompiled() -> str | None:
    """Why this Python compiles large packages at every start, as a message; None if it does not."""
    for name in LARGE:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.origin:
            continue
        compiled = Path(importlib.util.cache_from_source(spec.origin))
        if compiled.exists():
            continue
        if sys.dont_write_bytecode:
            return f"PYTHONDONTWRITEBYTECODE is set and {name} is not compiled"
        folder = compiled.parent
        while not folder.exists():
            folder = folder.parent
        if not os.access(folder, os.W_OK):
            return f"{folder} cannot be written and {name} is not compiled"
    return None


def cache_folder() -> Path:
    """This user's own folder for compiled modules."""
    return user_folder("cache") / "bytecode"


def environment() -> dict[str, str]:
    """Environment variables with which a job keeps its compiled modules for the next start; {} if none are needed."""
    if uncompiled() is None:
        return {}
    return {"PYTHONPYCACHEPREFIX": str(cache_folder()), "PYTHONDONTWRITEBYTECODE": ""}  # "" means not set
