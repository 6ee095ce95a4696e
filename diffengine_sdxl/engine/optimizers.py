"""Optimizers by name, besides all of torch.optim.

`AdamW8bit` (bitsandbytes), `Prodigy` (prodigyopt), `Adafactor` (transformers, with relative steps; torch's own is
`TorchAdafactor`, as mmengine names it).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.registry import OPTIMIZERS


def _third_party(module: str, name: str, package: str) -> Callable[..., Optimizer]:
    """Import the optimizer class `module.name`.

    Raises:
        UserError: the package is not installed, or lacks the class.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"optimizer type='{name}' needs the package {package}, which cannot be imported ({error}). "
                        f"Install it with `pip install {package}`, or choose another optimizer, such as type='AdamW'."
                        ) from error


@OPTIMIZERS.register_module()
def AdamW8bit(params: Any, **kwargs: Any) -> Optimizer:  # noqa: N802
    """AdamW with 8-bit states (Dettmers et al. 2022, arXiv 2110.02861), of bitsandbytes.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    return _third_party('bitsandbytes.optim', 'AdamW8bit', 'bitsandbytes')(params, **kwargs)


@OPTIMIZERS.register_module()
def Prodigy(params: Any, **kwargs: Any) -> Optimizer:  # noqa: N802
    """AdamW that finds its own learning rate (Mishchenko & Defazio 2023, arXiv 2306.06101), of prodigyopt; keep lr=1.

    All parameter groups must share one lr, or have lr=0.

    Raises:
        UserError: prodigyopt is not installed.
    """
    return _third_party('prodigyopt', 'Prodigy', 'prodigyopt')(params, **kwargs)


@OPTIMIZERS.register_module()
def Adafactor(params: Any, lr: float | None = None, **kwargs: Any) -> Optimizer:  # noqa: N802
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) of transformers.

    With lr=None its steps are relative to the weights and no schedule applies. With an lr, here or in a parameter
    group, `relative_step` defaults to False (in transformers to True, which then refuses the lr).

    Raises:
        UserError: this version of transformers has none, or an lr is combined with relative_step=True.
    """
    params = list(params)
    has_lr = lr is not None or any(isinstance(p, dict) and p.get('lr') is not None for p in params)
    kwargs.setdefault('relative_step', not has_lr)
    if has_lr and kwargs['relative_step']:
        raise UserError("optimizer type='Adafactor' takes either an lr or relative_step=True, not both.")
    return _third_party('transformers', 'Adafactor', 'transformers')(params, lr=lr, **kwargs)
