"""`diffengine-sdxl report W`: write report.html of a training or a test, also of one that still runs."""

from __future__ import annotations

import sys
from typing import Any

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.pages.run_report import write_report

STOPPED = 'Stopped; the report that was there stays.'


def run(args: Any, _: Any) -> None:
    """Write the report, print its path, and on stderr what was left out.

    Args:
        args: work_dir; as `cli` parses it.

    Raises:
        UserError: see `write_report`; or there is no such folder.
    """
    folder = args.work_dir.expanduser()
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder; name the work dir of a training or a test.")
    print(write_report(folder, lambda note: print(note, file=sys.stderr)))
