"""The two errors that a user is meant to read: one line each, never a traceback."""


class SurgvqaError(Exception):
    """The command ran and failed (exit code 1). The text names what, found, expected and the way out."""

    exit_code = 1


class UsageError(SurgvqaError):
    """The command could not be asked: bad options, missing or malformed input (exit code 2)."""

    exit_code = 2


def of_worker(error: SurgvqaError) -> SurgvqaError:
    """The error without the traceback that torch puts before its text when it comes from a data loader's worker."""
    kind = type(error)
    return kind(str(error).strip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__name__}: "))
