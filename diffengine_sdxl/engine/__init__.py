"""The engine: configs, the runner, its loop, hooks, checkpoints, launch, and pictures on request."""

from . import evaluation, hooks, loops, optim, runner, schedules  # noqa: F401  (fill the registries)
from .inference import inferencer  # noqa: F401
