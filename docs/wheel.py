"""`make wheel`: whether the wheel holds everything, and whether the demo runs from it, outside the checkout."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("surgvqa", "tui", "remote", "presets")
PROGRAMS = ("surgvqa", "surgvqa-remote", "surgvqa-tui")


def missing(wheel: Path) -> list[str]:
    """Tracked files of the packages, and the constraints, that the wheel lacks."""
    words = ["git", "-C", str(ROOT), "ls-files", *PACKAGES]
    tracked = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    return [name for name in [*tracked, "surgvqa/constraints.txt"] if name not in held]


def call(*words: object, cwd: Path) -> str:
    """Runs a command without what would lead it back to the checkout; exits with its output when it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"wheel: exit code {done.returncode}: {' '.join(map(str, words))}\n{done.stdout}")
    return done.stdout.strip()


def main() -> None:
    """Exits with a line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the wheel")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--extra", default="train", help="install with this extra: train, merge, or '' for the base")
    arguments = parser.parse_args()
    (wheel,) = arguments.folder.absolute().glob("*.whl")
    if lost := missing(wheel):
        sys.exit(f"wheel: {wheel.name} lacks {', '.join(lost)}")
    version = wheel.name.split("-")[1]
    words = ["git", "-C", str(ROOT), "tag", "--points-at", "HEAD"]
    tags = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()
    if tags and f"v{version}" not in tags:
        sys.exit(f"wheel: it is version {version}, but the tag here is {tags[0]}; set it in surgvqa/__init__.py")
    with tempfile.TemporaryDirectory() as folder:
        outside = Path(folder)
        call(arguments.python, "-m", "venv", outside / "venv", cwd=outside)
        python = outside / "venv" / "bin" / "python"
        install = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        extra = f"[{arguments.extra}]" if arguments.extra else ""
        call(*install, "--constraint", ROOT / "constraints.txt", f"{wheel}{extra}", cwd=outside)
        for program in PROGRAMS:
            said = call(outside / "venv" / "bin" / program, "--version", cwd=outside)
            if said != f"{program} {version}":
                sys.exit(f"wheel: {program} --version says {said!r}, expected {version}")
        if arguments.extra in ("train", "merge"):
            call(python, "-c", "import torch", cwd=outside)
        if arguments.extra == "train":
            print(call(outside / "venv" / "bin" / "surgvqa", "demo", "demo", "--run", cwd=outside))
    print(f"{wheel.name}: holds everything, installs with {extra or 'the base'}, and runs outside the checkout")


if __name__ == "__main__":
    main()
