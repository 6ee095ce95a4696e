"""`diffengine-sdxl card EXPORT`: write an export's model card again, with a test's results."""

from __future__ import annotations

import re
from typing import Any

from diffengine_sdxl.engine.model_card import write_card
from diffengine_sdxl.errors import UserError, first_line

STOPPED = 'Stopped.'


def run(args: Any, _: Any) -> None:
    """Write `README.md` into an export, and print its path.

    Args:
        args: export, metrics, repo_id; as `cli` parses them.

    Raises:
        UserError: `export` is no export in its training's work_dir, or `metrics` does not exist,
            `repo_id` is none; see `write_card`.
    """
    folder = args.export.resolve()
    match = re.fullmatch(r'step(\d+)', folder.name)
    if match is None or not folder.is_dir():
        raise UserError(f"'{args.export}' is no export of a training; name a folder step<N>/ in its work dir.")
    if args.metrics is not None and not args.metrics.is_file():
        raise UserError(f"There is no file '{args.metrics}'; name the metrics.json in the work dir of a test.")
    if args.repo_id is not None:
        from huggingface_hub.utils import HFValidationError, validate_repo_id
        try:
            validate_repo_id(args.repo_id)
        except HFValidationError as error:
            raise UserError(f"--repo-id '{args.repo_id}' is no name for a repository: {first_line(error)}") from error
    write_card(folder.parent, int(match[1]), args.metrics, args.repo_id)
    print(args.export / 'README.md')
