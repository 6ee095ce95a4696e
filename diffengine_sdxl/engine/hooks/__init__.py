"""Hooks, one file each."""

from . import (  # noqa: F401  (fill the registry)
    checkpoint,
    curves,
    early_stop,
    ema,
    first_steps,
    hub,
    progress,
    report,
    samples,
    utilization,
    validation_loss,
)
