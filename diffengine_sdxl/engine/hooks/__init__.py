"""Hooks, one file each."""

from . import checkpoint, curves, ema, first_steps, hub, progress, samples  # noqa: F401  (fill the registry)
