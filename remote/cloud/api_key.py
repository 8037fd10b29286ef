"""The API key of the provider's account, read from the environment or a private file and never shown."""

from __future__ import annotations

import os
from pathlib import Path

from surgvqa.errors import UsageError

VARIABLE = "LAMBDA_API_KEY"
KEY_FILE = Path("~/.config/surgvqa/lambda_api_key")


class ApiKey:
    """A secret that no repr, format or pickle shows."""

    __slots__ = ("_text",)

    def __init__(self, text: str, source: str = VARIABLE):
        text = text.strip()
        if not 8 <= len(text) <= 512 or not all("!" <= letter <= "~" for letter in text):
            raise UsageError(f"{source}: expected an API key of 8 to 512 printable ASCII characters without blanks")
        self._text = text

    def __repr__(self) -> str:
        return "ApiKey(…)"

    def __reduce__(self) -> str:
        raise TypeError("an API key is not written anywhere")

    def header(self) -> str:
        """The value of the Authorization header, made for each request and not stored."""
        return f"Bearer {self._text}"


def read_key() -> ApiKey:
    """From LAMBDA_API_KEY, else ~/.config/surgvqa/lambda_api_key, which only its owner may read; else UsageError."""
    text = os.environ.get(VARIABLE, "")
    if text.strip():
        return ApiKey(text)
    file = KEY_FILE.expanduser()
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise UsageError(f"no API key: set {VARIABLE}, or write it to {file} (chmod 600)") from None
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}, so the API key cannot be read") from None
    with open(descriptor, "rb") as stream:
        mode = os.fstat(stream.fileno()).st_mode
        if mode & 0o077:
            raise UsageError(f"{file}: others may read it (mode {mode & 0o777:03o}); run chmod 600 {file}")
        content = stream.read(4096)
    return ApiKey(content.decode("latin-1"), str(file))
