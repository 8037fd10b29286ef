"""Regular expressions out of an adapter's config, matched where they cannot hold anything up.

Python's `re` has no time limit, and a short pattern can keep it busy for ever; so a process of its own matches.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable

from surgvqa.errors import UsageError

SECONDS = 10.0
"""Matching all names of the real checkpoint takes some milliseconds."""
PROGRAM = r"""
import json, re, sys
pattern, names, at_end = json.load(sys.stdin)
try:
    re.compile(pattern)
    means = re.compile(rf"(?:.*\.)?(?:{pattern})" if at_end else pattern).fullmatch
except (re.error, OverflowError, RecursionError) as error:
    sys.exit(f"which is no regular expression ({error})")
json.dump([name for name in names if means(name)], sys.stdout)
"""


def matching(pattern: str, names: Iterable[str], where: str, at_end: bool = False) -> set[str]:
    """Those of `names` that `pattern` matches whole; `at_end`: or their end, from a dot on.

    Raises UsageError, naming `where` the pattern stands, for one that is no regular expression or takes too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", PROGRAM],
            input=json.dumps([pattern, list(names), at_end]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(f"{where} {pattern[:80]!r} takes more than {SECONDS:g} s to match; simplify it") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it cannot be matched"])[-1]
        raise UsageError(f"{where} {pattern[:80]!r}, {last}")
    return set(json.loads(done.stdout))
