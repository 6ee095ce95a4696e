"""The engine: configs, the runner, its loop, hooks, checkpoints and launch."""

from . import evaluation, hooks, inferencer, loops, optim, runner, schedules  # noqa: F401  (fill the registries)
