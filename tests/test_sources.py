"""Rules for sources that no linter has."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("surgvqa", "tui", "remote", "presets", "tests", "docs", "benchmarks")


def test_every_type_ignore_names_its_code_and_its_reason():
    mark = "type: " + "ignore"
    bare = [
        f"{file.relative_to(ROOT)}:{number}"
        for folder in FOLDERS
        for file in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if f"# {mark}" in line and not re.search(rf"# {mark}\[[a-z, -]+\]  # \S", line)
    ]
    assert bare == []
