"""Hooks, one file each."""

from . import (  # noqa: F401  (fill the registry)
    checkpoint,
    curves,
    ema,
    first_steps,
    hub,
    progress,
    samples,
    utilization,
    validation_loss,
)
