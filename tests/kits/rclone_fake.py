"""A program rclone of our own, for tests without the real one: buckets are folders below the file's own `buckets`.

It knows what remote/agent/results.py asks for, fails in rclone's own words, and writes down how it was called. Faults
are words in the file `faults` beside it, each met once: damages (copy stores other bytes of the same size), denied
(copy), hangs (copy, until it is killed).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PROGRAM = """#!{python}
import fnmatch, json, os, sys, time
from pathlib import Path

here = Path(__file__).parent
words = [word for word in sys.argv[1:] if not word.startswith("--")]
said = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
with open(here / "asked", "a") as asked:
    asked.write(json.dumps([sys.argv[1:], {{k: v for k, v in os.environ.items() if k.startswith("RCLONE_")}}]) + "\\n")

def fault(name):
    file = here / "faults"
    found = file.read_text().split() if file.exists() else []
    if name in found:
        found.remove(name)
        file.write_text(" ".join(found))
        return True

def end(text):
    for line in text.splitlines():
        print("2026/11/27 17:21:53 " + line, file=sys.stderr)
    sys.exit(1)

def place(remote):
    bucket = remote[4:].partition("/")[0]
    assert remote.startswith(":s3:") and os.environ["RCLONE_S3_ENV_AUTH"] == "true", remote
    if os.environ.get("AWS_SECRET_ACCESS_KEY") != "{secret}":
        end("ERROR : x: Failed to copy: SignatureDoesNotMatch: not " + os.environ.get("AWS_SECRET_ACCESS_KEY", ""))
    if not (here / "buckets" / bucket).is_dir():
        end("ERROR : x: Failed to copy: NoSuchBucket: The specified bucket does not exist")
    return here / "buckets" / remote[4:]

def files(folder):
    return [f for f in sorted(folder.rglob("*")) if f.is_file() and not f.is_symlink() and f.name != said["exclude"]]

if words[0] == "copy":
    if fault("denied"):
        end("ERROR : runs/x: Failed to copy: AccessDenied: Access Denied\\n\\tstatus code: 403\\nFailed to copy")
    while fault("hangs"):
        time.sleep(3600)
    source, target = Path(words[1]), place(words[2])
    for file in files(source):
        there, content = target / file.relative_to(source), file.read_bytes()
        if there.is_file() and there.stat().st_size == len(content) and "--ignore-times" not in sys.argv:
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(b"?" * len(content) if fault("damages") else content)
elif words[0] == "check":
    assert "--download" in sys.argv and "--one-way" in sys.argv
    source, target = Path(words[1]), place(words[2])
    for file in files(source):
        name = file.relative_to(source)
        if not (target / name).is_file() or (target / name).read_bytes() != file.read_bytes():
            print("*" if (target / name).is_file() else "+", name)
            end("NOTICE: S3 bucket: 1 differences found\\nFailed to check: 1 differences found")
elif words[0] == "deletefile":
    place(words[1]).unlink()
else:
    end("Failed: unknown command")
"""
SECRET = "secret_of_s3_0123456789"
GIVEN = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET}


class FakeRclone:
    """In `folder`, which belongs on PATH."""

    def __init__(self, folder: Path, bucket: str = "bucket"):
        self.folder, self.bucket = folder, folder / "buckets" / bucket
        self.bucket.mkdir(parents=True)
        program = folder / "rclone"
        program.write_text(PROGRAM.format(python=sys.executable, secret=SECRET))
        program.chmod(0o755)
        self.path = f"{folder}:{os.environ['PATH']}"

    def fails(self, *faults: str) -> None:
        (self.folder / "faults").write_text(" ".join(faults))

    def asked(self) -> str:
        """Every call: its arguments and its settings."""
        return (self.folder / "asked").read_text()
