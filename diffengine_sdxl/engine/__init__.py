"""Training and evaluation: the runner, its loops, optimizers, hooks, checkpoints and exports."""

from . import (  # noqa: F401  (fill the registries)
    eval_loop,
    hooks,
    lr_schedulers,
    optim,
    optimizers,
    runner,
    test_loop,
    trackio_backend,
    train_loop,
)
