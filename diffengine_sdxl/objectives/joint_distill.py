"""Repair a set of adapters: train them together, each held to what it does alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffengine_sdxl import rng
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.objectives.denoise import Denoise, denoise
from diffengine_sdxl.protocols import Denoiser
from diffengine_sdxl.registry import OBJECTIVES
from diffengine_sdxl.structures import Batch


@OBJECTIVES.register_module()
class JointDistill(Denoise):
    """Denoise with all adapters, plus the distance of one adapter alone from what its `weights` in the config make.

    loss = Denoise + alone * mean of w(t) * loss(model with adapter i now, model with adapter i as it was), where i is
    drawn for each micro-batch from its first sample's key (distillation of the output, Hinton et al. 2015).
    Adapter i reads its own condition; noise and timesteps are those of the first term. A step has two more passes
    forward and one more backward than Denoise.

    Args:
        alone: weight of the second term.
        noise, timesteps, weighting, loss: see Denoise.

    Raises:
        UserError: an adapter that trains has no `weights`, so there is nothing to be held to; nothing but adapters may
            train; or gradient checkpointing is on.
    """

    #: It would recompute the pass of one adapter with all of them.
    allows_checkpointing = False

    def __init__(self, alone: float = 1.0, noise: Any = None, timesteps: Any = None, weighting: Any = None,
                 loss: Any = None) -> None:
        super().__init__(noise, timesteps, weighting, loss)
        if not isinstance(alone, int | float) or isinstance(alone, bool) or not 0 < alone < float('inf'):
            raise UserError(f'JointDistill: alone={alone!r} must be a positive number; use Denoise without it.')
        self.alone = float(alone)
        self._former: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}

    def remember(self, model: Any) -> None:
        """Keep the weights that the config names; before a resumed run's, or those of `load_from`, are loaded.

        Raises:
            UserError: see the class.
        """
        if model.trainable_parts:
            raise UserError(f'JointDistill trains adapters only; remove {list(model.trainable_parts)} from '
                            'model.trainable.')
        trained = {name: adapter for name, adapter in model.adapters.items() if adapter.trainables()}
        if model.unet.is_gradient_checkpointing:
            raise UserError('JointDistill cannot be used with gradient checkpointing, which would recompute the pass '
                            'of one adapter with all of them; set model.gradient_checkpointing=False.')
        if fresh := [name for name, adapter in trained.items() if not adapter.weights and model.device.type != 'meta']:
            raise UserError(f"JointDistill holds each adapter to what it does alone, and '{fresh[0]}' starts from "
                            f'nothing; set model.adapters.{fresh[0]}.weights to a trained one, or trainable=False.')
        self._former = {name: [(p, p.detach().clone()) for p in adapter.trainables()]
                        for name, adapter in sorted(trained.items())}

    def __call__(self, model: Denoiser, batch: Batch) -> dict[str, Tensor]:
        """Return {'loss': [], 'loss_alone': []}; see Denoise."""
        inputs = self.inputs(model, batch)
        # First, as the pass of all adapters leaves them as drawn.
        return {'loss_alone': self.alone * self._distance(model, batch, inputs), **self.losses(model, batch, inputs)}

    def _distance(self, model: Denoiser, batch: Batch, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Return the loss of one adapter alone against its former self, []."""
        names = [*self._former]
        first = int(batch.seed[0]), batch.key[0], int(batch.epoch[0])
        name = names[rng.key_seed('joint distillation', *first) % len(names)]
        own = replace(batch, drop={k: rows for k, rows in batch.drop.items() if k in ('text', name)})
        with model.only_adapter(name):
            with torch.no_grad(), self._as_it_was(name, model.adapters[name]):
                target = denoise(model, own, *inputs)[1]
            t, prediction, _ = denoise(model, own, *inputs)
        loss = self.loss(prediction, target, t, model.schedule).mean(dim=(1, 2, 3))
        return (loss * self.weighting(t, model.schedule)).mean()

    @contextmanager
    def _as_it_was(self, name: str, adapter: Any) -> Iterator[None]:
        """Give an adapter its former weights inside, without dropout."""
        now: Sequence[Tensor] = [parameter.data for parameter, _ in self._former[name]]
        self._former[name] = [(p, before.to(p.device)) for p, before in self._former[name]]
        training = adapter.training
        adapter.eval()
        for parameter, before in self._former[name]:
            parameter.data = before
        try:
            yield
        finally:
            adapter.train(training)
            for (parameter, _), data in zip(self._former[name], now, strict=True):
                parameter.data = data
