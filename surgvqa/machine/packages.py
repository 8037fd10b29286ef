"""Which packages of an extra are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from surgvqa.errors import SurgvqaError

TORCH = ("torch",)
TRAIN = (*TORCH, "transformers", "peft", "librosa")


def require_installed(what: str, packages: Sequence[str], extra: str) -> None:
    """Raises SurgvqaError for packages that are missing here; `what` needs them, and the extra of that name of our own
    package brings them."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise SurgvqaError(f"{', '.join(missing)} not installed here; {what} needs: pip install 'surgvqa[{extra}]'")
