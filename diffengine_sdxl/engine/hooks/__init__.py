"""Hooks, one file each."""

from . import checkpoint, curves, ema, hub, progress, samples  # noqa: F401  (fill the registry)
