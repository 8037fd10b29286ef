"""Matches the regular expressions of an adapter's config in a process of its own, with a time limit.

Python's `re` has no time limit, and even a short pattern can take forever.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence

from surgvqa.errors import UsageError

SECONDS = 10.0
"""Time limit for all patterns of a field; one takes a few milliseconds on the real checkpoint's names."""
MOST_PATTERNS = 10_000
PROGRAM = r"""
import json, re, sys
patterns, names, at_end = json.load(sys.stdin)
for pattern in patterns:
    print(json.dumps(pattern), file=sys.stderr, flush=True)
    try:
        re.compile(pattern)
        if at_end:
            means = re.compile(rf"(.*\.)?({pattern})$").match
        else:
            means = re.compile(pattern).fullmatch
    except (re.error, OverflowError, RecursionError) as error:
        print(f"which is not a regular expression ({error})", file=sys.stderr)
        sys.exit(1)
    print(json.dumps([number for number, name in enumerate(names) if means(name)]))
"""


def matching(patterns: Sequence[str], names: Iterable[str], where: str, at_end: bool = False) -> list[set[str]]:
    """For each pattern, those of `names` that it matches whole or, with `at_end`, from a dot to their end.

    PEFT matches target_modules and rank_pattern in these ways (peft.tuners.tuners_utils, `get_pattern_key`). Raises
    UsageError, which says `where` the pattern is, for an invalid regular expression or one that takes too long.
    """
    if len(patterns) > MOST_PATTERNS:
        raise UsageError(f"{where} {len(patterns)} patterns, expected {MOST_PATTERNS} at most")
    names = list(names)
    if not patterns or not names:
        return [set() for _ in patterns]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        out, stderr = process.communicate(json.dumps([list(patterns), names, at_end]), timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        stderr = process.communicate()[1]
        raise UsageError(f"{where} {_tried(stderr)} takes more than {SECONDS:g} s to match; simplify it") from None
    if process.returncode:
        lines = stderr.strip().splitlines() or ["which cannot be matched"]
        raise UsageError(f"{where} {_tried(stderr)}, {lines[-1]}")
    return [{names[number] for number in json.loads(line)} for line in out.splitlines()]


def _tried(stderr: str) -> str:
    """The pattern that the process was matching, shortened."""
    patterns_tried = [line for line in stderr.splitlines() if line.startswith('"')]
    return repr(str(json.loads(patterns_tried[-1]))[:80]) if patterns_tried else "a pattern that"
