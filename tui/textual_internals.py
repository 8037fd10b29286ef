"""The private names of Textual that the panel relies on, in one place; a test checks each."""

from __future__ import annotations

from typing import Any

from textual.app import App
from textual.widgets._footer import FooterKey

__all__ = ["FooterKey", "crash_of"]


def crash_of(app: App[Any]) -> Exception | None:
    """The unhandled exception that ended the app: `App._exception`, set by `App._handle_exception`."""
    return app._exception
