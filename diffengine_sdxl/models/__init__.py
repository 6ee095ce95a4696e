"""The model: SDXL, its text encoders, its attention, and how its parts are loaded."""

from . import sdxl  # noqa: F401  (fills the registry)
