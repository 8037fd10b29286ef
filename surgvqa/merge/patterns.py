"""Regular expressions out of an adapter's config, matched where they cannot hold anything up.

Python's `re` has no time limit, and a short pattern can keep it busy for ever; so a process of its own matches.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence

from surgvqa.errors import UsageError

SECONDS = 10.0
"""For all patterns of a field; matching all names of the real checkpoint takes some milliseconds a pattern."""
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
        print(f"which is no regular expression ({error})", file=sys.stderr)
        sys.exit(1)
    print(json.dumps([number for number, name in enumerate(names) if means(name)]))
"""


def matching(patterns: Sequence[str], names: Iterable[str], where: str, at_end: bool = False) -> list[set[str]]:
    """For each pattern those of `names` that it matches whole; `at_end`: or their end, from a dot on.

    Both as PEFT matches target_modules and rank_pattern (peft.tuners.tuners_utils, `get_pattern_key`). Raises
    UsageError, naming `where` the pattern stands, for one that is no regular expression or takes too long.
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
        out, told = process.communicate(json.dumps([list(patterns), names, at_end]), timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        told = process.communicate()[1]
        raise UsageError(f"{where} {_last(told)} takes more than {SECONDS:g} s to match; simplify it") from None
    if process.returncode:
        lines = told.strip().splitlines() or ["which cannot be matched"]
        raise UsageError(f"{where} {_last(told)}, {lines[-1]}")
    return [{names[number] for number in json.loads(line)} for line in out.splitlines()]


def _last(told: str) -> str:
    """The pattern that the process was at, shortened."""
    told_patterns = [line for line in told.splitlines() if line.startswith('"')]
    return repr(str(json.loads(told_patterns[-1]))[:80]) if told_patterns else "a pattern that"
