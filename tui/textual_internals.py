"""The private names of Textual that the panel relies on, in one place; a test checks each."""

from __future__ import annotations

import contextlib
from typing import IO, Any

from textual.app import App
from textual.drivers._writer_thread import WriterThread
from textual.widgets._footer import FooterKey

__all__ = ["FooterKey", "OutputThread", "crash_of", "survive_lost_terminal", "write_raw"]


class LosableTerminal:
    """A terminal to write to. Once it is lost, what is written goes nowhere, without an error."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, text: str) -> int:
        """As of a text file."""
        with contextlib.suppress(OSError):
            self.file.write(text)
        return len(text)

    def flush(self) -> None:
        """As of a text file."""
        with contextlib.suppress(OSError):
            self.file.flush()

    def fileno(self) -> int:
        """As of a file."""
        return self.file.fileno()


class OutputThread(WriterThread):
    """Textual's thread that writes to the terminal: it keeps emptying its queue when the terminal is gone.

    Textual's own ends with the first failed write. Its queue holds 30 writes, so the panel then waits for ever to add
    another, and neither a signal nor the missing terminal can end it.
    """

    def __init__(self, file: IO[str]) -> None:
        terminal: Any = LosableTerminal(file)
        super().__init__(terminal)


def survive_lost_terminal() -> None:
    """Makes Textual's driver write through `OutputThread`: `linux_driver.WriterThread`. Does nothing on Windows."""
    with contextlib.suppress(ImportError):
        from textual.drivers import linux_driver

        linux_driver.WriterThread = OutputThread  # type: ignore[misc]  # a class in place of another


def crash_of(app: App[Any]) -> Exception | None:
    """The unhandled exception that ended the app: `App._exception`, set by `App._handle_exception`."""
    return app._exception


def write_raw(app: App[Any], sequence: str) -> None:
    """An escape sequence of our own to the terminal, between two frames: `App._driver.write`."""
    if app._driver is not None:
        app._driver.write(sequence)
