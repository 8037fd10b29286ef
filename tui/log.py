"""The panel's own log: what it showed in one line, with the traceback. Bounded in size, readable by its owner only.

Modules write with `logging.getLogger(__name__)`; without `write_to` (in tests) nothing is written.
"""

from __future__ import annotations

import logging
import os
import re
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from surgvqa.files import user_folder

LARGEST_BYTES = 500_000
"""Of the log; one older file of that size is kept beside it."""
SECRET_NAME = re.compile("TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
"""Names of environment variables whose values are secrets."""
SHORTEST_SECRET = 6
URL_LOGIN = re.compile(r"\b(\w{1,20}://)[^/\s@]{1,500}@")

logging.getLogger("tui").addHandler(logging.NullHandler())  # else Python would write errors over the screen
path: Path | None = None
"""Where the log is written; None when it is not."""


def default_path() -> Path:
    """`panel.log` in the user's state folder."""
    return user_folder("state") / "panel.log"


class WithoutSecrets(logging.Formatter):
    """Values of secret environment variables and logins in URLs are left out."""

    def format(self, record: logging.LogRecord) -> str:
        text = URL_LOGIN.sub(r"\1***@", super().format(record))
        for name, value in os.environ.items():
            if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET:
                text = text.replace(value, "***")
        return text


class OwnersFile(RotatingFileHandler):
    """Only its owner may read the log."""

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        os.chmod(self.baseFilename, 0o600)
        return stream


def write_to(file: Path) -> None:
    """Writes the panel's log to `file` from now on. Raises OSError when that is not possible."""
    global path
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = OwnersFile(file, maxBytes=LARGEST_BYTES, backupCount=1, encoding="utf-8", errors="replace")
    handler.setFormatter(WithoutSecrets("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("tui")
    for old in [h for h in logger.handlers if isinstance(h, RotatingFileHandler)]:
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.propagate = False
    path = file


def where() -> str:
    """`; details: ~/.local/state/surgvqa/panel.log`, or nothing when no log is written."""
    if path is None:
        return ""
    home = Path.home()
    return f"; details: {'~' / path.relative_to(home) if path.is_relative_to(home) else path}"
