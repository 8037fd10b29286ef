"""The two errors that users see, each as one line without a traceback."""


class SurgvqaError(Exception):
    """The command ran and failed (exit code 1).

    The text names the file or field, and says what was found, what was expected and what to do.
    """

    exit_code = 1


class UsageError(SurgvqaError):
    """The command could not start, because of bad options or missing or malformed input (exit code 2)."""

    exit_code = 2


def of_worker(error: SurgvqaError) -> SurgvqaError:
    """`error` without the traceback that torch prepends to the text of an error from a data loader's worker."""
    kind = type(error)
    last = (str(error).strip().splitlines() or [""])[-1]
    return kind(last.removeprefix(f"{kind.__module__}.{kind.__name__}: "))


def first_line(error: BaseException) -> str:
    """The first line of an error that is not blank. Libraries begin messages with blank lines or give none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
