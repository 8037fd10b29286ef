"""Where Python keeps the compiled modules of large packages: where it cannot, every start compiles them anew.

torch and transformers are 2,600 modules at the start of a training, which took 8 s on a GPU machine whose
site-packages belonged to root and was installed without compiling. Standard library only.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

LARGE = ("torch", "transformers")


def uncompiled() -> str | None:
    """Why large packages are compiled at every start of this Python, for people; None where they are not."""
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
    """This user's own place for compiled modules (XDG Base Directory Specification)."""
    cache = os.environ.get("XDG_CACHE_HOME") or ""
    return Path(cache if os.path.isabs(cache) else Path.home() / ".cache", "surgvqa", "bytecode")


def environment() -> dict[str, str]:
    """What a job's environment needs so that its next start finds the modules compiled; {} where nothing is needed."""
    if uncompiled() is None:
        return {}
    return {"PYTHONPYCACHEPREFIX": str(cache_folder()), "PYTHONDONTWRITEBYTECODE": ""}  # "" is not set
