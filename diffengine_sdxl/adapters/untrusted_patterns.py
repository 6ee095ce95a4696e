"""Match regular expressions from downloaded files, which could make Python's matcher run for hours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from diffengine_sdxl.errors import UserError

#: Seconds for all names together; ordinary patterns take a hundredth of one. Each part of a file has up to three calls.
TIME_LIMIT = 3
#: Bytes of the process.
MEMORY_LIMIT = 2**29
_MATCH = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
except (ImportError, OSError, ValueError):
    pass  # not on every system
patterns, names = json.load(sys.stdin)
compiled = [re.compile(pattern) for pattern in patterns]
json.dump([next((i for i, p in enumerate(compiled) if p.fullmatch(name)), None) for name in names], sys.stdout)
"""


def first_matches(patterns: Sequence[str], names: Sequence[str], source: str | Path) -> list[int | None]:
    """Return for each name the index of the first pattern that matches all of it, or None.

    The matcher runs in a process of its own, since nothing else can stop it.

    Args:
        source: the file that the patterns are from, for errors.

    Raises:
        UserError: a pattern is invalid, or matching takes longer than TIME_LIMIT.
    """
    if not patterns:
        return [None] * len(names)
    try:
        run = subprocess.run([sys.executable, '-I', '-S', '-c', _MATCH, str(MEMORY_LIMIT)],
                             input=json.dumps([patterns, names]),
                             capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"'{source}' holds a regular expression that takes longer than {TIME_LIMIT} s to match "
                        f'({", ".join(patterns)[:200]}); the file may be malicious.') from error
    if run.returncode:
        raise UserError(f"'{source}' holds an invalid regular expression ({', '.join(patterns)[:200]}): "
                        f'{(run.stderr.strip() or "matching failed").splitlines()[-1]}')
    matches: list[int | None] = json.loads(run.stdout)
    return matches
