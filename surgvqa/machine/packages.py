"""Checks that packages of an extra are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from surgvqa.errors import SurgvqaError

TORCH = ("torch",)
TRAIN = (*TORCH, "transformers", "peft", "librosa")


def require_installed(what: str, packages: Sequence[str], extra: str) -> None:
    """Raises SurgvqaError for missing packages. `what` needs them, and our package's `extra` installs them."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise SurgvqaError(f"{', '.join(missing)} not installed here; {what} needs: pip install 'surgvqa[{extra}]'")
