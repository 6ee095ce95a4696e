"""Training and evaluation: the runner, its loops, optimizers, hooks, checkpoints and exports."""

from . import eval_loop, hooks, lr_schedulers, optim, runner, train_loop  # noqa: F401  (fill the registries)
