"""Finds out whether Weights & Biases has an API key on this machine, without using the key itself."""

from __future__ import annotations

import netrc
import os

WANDB_HOST = "api.wandb.ai"


def wandb_key_source() -> str | None:
    """Where wandb will find a key: `WANDB_API_KEY` or the path of the netrc file ($NETRC, else ~/.netrc); else None.

    As in wandb, the environment variable takes precedence.
    """
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    file = os.environ.get("NETRC")
    try:
        found = netrc.netrc(file or None).authenticators(WANDB_HOST)
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return None
    return (file or "~/.netrc") if found else None
