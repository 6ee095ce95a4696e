"""report.html: what a training and its tests left in a work_dir, as one page that needs no other file."""

from .write import NAME, write_report  # noqa: F401
