"""Pictures of a batch: by the model with its adapters, by its base alone, from the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from diffengine_sdxl.structures import Batch

#: Whose picture it is: the base's alone, or that of the model with all its adapters.
BASE, ADAPTED = VARIANTS = ('base', 'adapted')


@contextmanager
def frozen(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, none of `weights` requires gradients; afterwards those that did require them again.

    torch.matmul folds a batch of matrices into one where the weight requires gradients, also under `no_grad`
    (`should_fold` in ATen/native/LinearAlgebra.cpp): another kernel, and on some processors other last bits. An export
    is loaded frozen, so sampling while training must be frozen too. Only the flags change: the Parameters, their
    gradients and the hooks that DDP and optimizers hold stay as they are.
    """
    trained = [parameter for parameter in weights if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Inside, `model` (an SDXL) is its base alone: what was attached to the base's own modules is switched off too."""
    if model.alone:
        yield
        return
    with ExitStack() as stack:
        for adapter in model.adapters.values():
            stack.enter_context(adapter.disabled())
        model.alone = True
        try:
            yield
        finally:
            model.alone = False


def predictions(model: Any, batch: Batch, variants: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One dict a sample: key, seed, prompt, images {variant: [3, H, W] in [0, 1], fp32}.

    Every variant starts from the noise of the sample's seed and goes through the same encode and predict.

    Args:
        model: an SDXL with a sampler. batch: B samples.
        variants: of `model.variants`; None takes the model as it stands, which is 'adapted' if it has adapters.

    Raises:
        ValueError: the model has no such variant; or see Sampler.
    """
    assert model.sampler is not None, 'the runner checks that a model that samples has a sampler'
    wanted = model.variants[-1:] if variants is None else tuple(variants)
    for variant in wanted:
        if variant not in VARIANTS:
            raise ValueError(f"variant '{variant}' is not known; choose of {', '.join(map(repr, VARIANTS))}.")
        if variant not in model.variants:
            raise ValueError("The model has no adapters, so there are no pictures 'adapted'; its own are 'base'.")
    images = {}
    for variant in wanted:
        with ExitStack() as stack:
            if variant == BASE and model.adapters:
                stack.enter_context(without_adapters(model))
            images[variant] = model.decode(model.sampler(model, batch))
    return [{'key': batch.key[i], 'seed': int(batch.seed[i]), 'prompt': batch.text[i],
             'images': {variant: made[i] for variant, made in images.items()}} for i in range(len(batch))]
