"""Where a machine that ends itself leaves its results: a folder that stays, a target of rsync, or S3 through rclone."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.files import sha256_file
from surgvqa.untrusted import one_line

MARK = "surgvqa-results.txt"
NEVER = "start.json"
"""A launch's environment, which may hold secrets."""
FORMS = "expected s3://BUCKET/PREFIX, USER@HOST:FOLDER (rsync), or an absolute folder there that outlives the machine"
S3 = "s3://"
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
COMPARED = {"* ": "differs there", "+ ": "is missing there", "! ": "cannot be read back"}
"""What `rclone check --combined` says of a file."""
S3_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION",
                "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")  # fmt: skip
"""What the laptop's environment says of S3, under the names that AWS's own tools read."""
IN_MEMORY = ("tmpfs", "ramfs")
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15"
RSYNC = ["rsync", "-a", "--partial", "--timeout=300", f"--exclude={NEVER}", "-e", SSH]
RCLONE = ["rclone", "--retries=1", "--low-level-retries=5", "--contimeout=20s", "--timeout=2m", f"--exclude={NEVER}"]


def kind_of(results: str) -> str:
    """folder, rsync or s3, by the form alone. UsageError for anything else."""
    first, _, rest = results[len(S3) :].partition("/")
    if not results.isprintable() or results.startswith("-"):
        wrong = "cannot be one"
    elif results.startswith(S3):
        parts = rest.rstrip("/").split("/") if rest else []
        if BUCKET.fullmatch(first) and not {"", ".", ".."} & set(parts):
            return "s3"
        wrong = "names no bucket and prefix of S3"
    elif "://" in results:
        wrong = "is a URL of another kind"
    elif os.path.isabs(results):
        return "folder"
    elif ":" in results.partition("/")[0]:
        return "rsync"
    else:
        wrong = "is a relative folder"
    raise UsageError(f"--results {one_line(results)}: {wrong}; {FORMS}")


def check(workspace: str, results: str, given: dict[str, str]) -> None:
    """Copies a small file to `results`, reads it back, and removes it from S3. Raises when anything is missing."""
    kind = kind_of(results)
    if kind == "folder":
        if not os.path.isdir(results):
            raise UsageError(f"--results {results}: no such folder on this machine; {FORMS}")
        if os.stat(results).st_dev == os.stat(workspace).st_dev:
            raise UsageError(f"--results {results}: lies on this machine's own disk, which goes with it; {FORMS}")
        if file_system_of(results) in IN_MEMORY:
            raise UsageError(f"--results {results}: lies in this machine's memory, which goes with it; {FORMS}")
    elif not shutil.which("rsync" if kind == "rsync" else "rclone"):
        tool = "rsync" if kind == "rsync" else "rclone"
        raise SurgvqaError(f"--results {results}: needs {tool} on this machine: sudo apt-get install {tool}")
    with tempfile.TemporaryDirectory() as trial:
        Path(trial, "runs").mkdir()
        Path(trial, "runs", MARK).write_text(f"surgvqa copies runs here {secrets.token_hex(8)}\n", encoding="utf-8")
        copy(trial, ["runs"], results, given)
    if kind == "s3":
        with contextlib.suppress(SurgvqaError):  # results need not be removable
            _rclone(["deletefile", f"{_remote(results)}/runs/{MARK}"], results, given)


def file_system_of(path: str) -> str:
    """Its kind, as Linux names it; "" if that is not known."""
    device = os.stat(path).st_dev
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for mount in mounts:
            words = mount.split()
            if words[2] == f"{os.major(device)}:{os.minor(device)}" and "-" in words:
                return words[words.index("-") + 1]
    return ""


def copy(workspace: str, folders: list[str], results: str, given: dict[str, str]) -> None:
    """The files of these folders of the workspace to `results`, under the same names, and compares every byte or hash.

    `given`: those of S3_VARIABLES that are known. SurgvqaError when a file is not there, whole.
    """
    kind = kind_of(results)
    if kind == "rsync":
        _make_folders(folders, results)
    for folder in folders:
        source, target = os.path.realpath(os.path.join(workspace, folder)), f"{results.rstrip('/')}/{folder}"
        if kind == "rsync":
            _copy_by_rsync(source, target)
        elif kind == "s3":
            _copy_to_s3(source, f"{_remote(results)}/{folder}", results, given)
        else:
            _copy_to_folder(Path(source), Path(target))


def _copy_to_folder(source: Path, target: Path) -> None:
    for file in sorted(source.rglob("*")):
        if file.is_symlink() or not file.is_file() or file.name == NEVER:
            continue
        there = target / file.relative_to(source)
        try:
            there.parent.mkdir(parents=True, exist_ok=True)
            if not there.is_file() or there.stat().st_size != file.stat().st_size or _differ(file, there):
                part = there.with_name(there.name + ".part")
                shutil.copyfile(file, part)
                os.replace(part, there)
                if _differ(file, there):
                    raise SurgvqaError(f"{there}: differs from {file}")
        except OSError as error:
            raise SurgvqaError(f"{there}: {error.strerror}") from None


def _differ(one: Path, other: Path) -> bool:
    return sha256_file(one) != sha256_file(other)


def _make_folders(folders: list[str], results: str) -> None:
    """rsync makes one missing folder, not the ones above it: it is given a tree of empty ones."""
    with tempfile.TemporaryDirectory() as tree:
        for folder in folders:
            os.makedirs(os.path.join(tree, folder), exist_ok=True)
        _run([*RSYNC, "--", f"{tree}/", f"{results.rstrip('/')}/"], results)


def _copy_by_rsync(source: str, target: str) -> None:
    ends = ["--", f"{source}/", f"{target}/"]  # with a slash: `source` may be a link to another disk
    _run([*RSYNC, *ends], target)
    compared = _run([*RSYNC, "--checksum", "--dry-run", "--itemize-changes", *ends], target)
    if changed := [line for line in compared.splitlines() if line.startswith("<f")]:
        raise SurgvqaError(f"{target}: differs: {one_line(changed[0])}")


def _copy_to_s3(source: str, target: str, results: str, given: dict[str, str]) -> None:
    """Reads every object back: an MD5 that the listing has may be what the sender claimed, and not what is stored."""
    _rclone(["copy", source, target], results, given)
    compare = ["check", "--one-way", "--download", "--combined=-", source, target]
    try:
        _rclone(compare, results, given)
    except SurgvqaError:  # of the same size and time, and yet another: everything is sent again
        _rclone(["copy", "--ignore-times", source, target], results, given)
        _rclone(compare, results, given)


def _remote(results: str) -> str:
    return f":s3:{results[len(S3) :].rstrip('/')}"


def _rclone(words: list[str], results: str, given: dict[str, str]) -> None:
    environment = {**os.environ, **given}
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if authorities := environment.pop("AWS_CA_BUNDLE", ""):  # rclone fails with it
        environment["RCLONE_CA_CERT"] = authorities
    settings = {
        "CONFIG": os.devnull,
        "S3_PROVIDER": "Other" if endpoint else "AWS",
        "S3_ENV_AUTH": "true",
        "S3_NO_CHECK_BUCKET": "true",  # else it would try to make the bucket
        "S3_NO_HEAD": "true",  # all is read back anyway, and some servers refuse it after an upload in parts
        **({"S3_ENDPOINT": endpoint} if endpoint else {}),
        **({"S3_REGION": region} if region else {}),
    }
    environment.update({f"RCLONE_{name}": value for name, value in settings.items()})
    secret = [value for name, value in given.items() if "KEY" in name or "TOKEN" in name]
    _run([*RCLONE, *words], results, environment, secret)


def _run(words: list[str], results: str, env: dict[str, str] | None = None, secret: list[str] | None = None) -> str:
    """Its output. SurgvqaError with the line that tells why it failed, without what is `secret`."""
    try:
        done = subprocess.run(
            words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise SurgvqaError(f"{results}: {words[0]}: {error.strerror}") from None
    if done.returncode == 0:
        return done.stdout
    lines = [re.sub(r"^\d{4}/\d\d/\d\d [\d:]+ ", "", line) for line in done.stderr.splitlines() if line.strip()]
    compared = [f"{line[2:]}: {COMPARED[line[:2]]}" for line in done.stdout.splitlines() if line[:2] in COMPARED]
    told = [*compared, *(line for line in lines if line.startswith(("ERROR :", "Failed ")))]
    why = (told or lines[-1:] or ["failed"])[0]
    for value in secret or []:
        why = why.replace(value, "…")
    raise SurgvqaError(f"{results}: {words[0]}: {one_line(why)[:300]}")
