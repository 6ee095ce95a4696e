"""Model cards: an export's README.md, written from what its run and its tests left in the work_dir."""

from .facts import public_manifest  # noqa: F401
from .write import update, write_card  # noqa: F401
