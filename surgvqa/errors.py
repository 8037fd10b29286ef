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


def unimportable(error: BaseException) -> str | None:
    """The package whose own import failed with `error`, or with an error behind it; None for any other error."""
    return _failed_import(error)[0]


def unexpected(error: BaseException) -> str:
    """One line for an error that is not ours."""
    package, error = _failed_import(error)
    what = f"{type(error).__name__}: {first_line(error)}"
    return f"{package} cannot be imported ({what}); surgvqa doctor says how to mend it" if package else what


OWN = ("__main__", "surgvqa", "remote", "tui", "presets")


def _failed_import(error: BaseException) -> tuple[str | None, BaseException]:
    """(the package whose import failed, its error); (None, `error`) where no import did.

    PEFT imports bitsandbytes, and transformers imports torchvision, so the package is often not the one that we import.
    """
    found: tuple[str | None, BaseException] = (None, error)
    behind: BaseException | None = error
    while behind:
        trace = behind.__traceback__
        while trace:
            frame = trace.tb_frame
            package = str(frame.f_globals.get("__name__")).partition(".")[0]
            if frame.f_code.co_name == "<module>" and package not in OWN:
                found = package, behind
            trace = trace.tb_next
        behind = behind.__cause__ or behind.__context__
    return found
