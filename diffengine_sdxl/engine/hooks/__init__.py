"""Hooks, one file a concern."""

from . import checkpoint, curves, ema, hub, progress, samples  # noqa: F401  (fill the registry)
