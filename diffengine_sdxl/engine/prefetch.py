"""What a training step needs, before it begins: drawn in the data loader's workers, copied while the last step runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffengine_sdxl import rng
from diffengine_sdxl.structures import Lookups, to_device


def draw_in_workers(dataloader: DataLoader[Any], model: Any) -> None:
    """Let the loader's workers draw what `model.objective` would draw in the step, if it has `draw`.

    The draws are keyed by sample, so they are the same bits; `Batch.drawn` takes them to the objective.
    """
    if hasattr(model.objective, 'draw'):
        dataloader.collate_fn = DrawingCollate(dataloader.collate_fn, model)


class DrawingCollate:
    """A collate function that adds 'drawn' to what `collate_fn` collates; it can be pickled, for spawned workers."""

    def __init__(self, collate_fn: Callable[[Any], dict[str, Any]], model: Any) -> None:
        self.collate_fn, self.draw, self.schedule = collate_fn, model.objective.draw, model.schedule
        self.channels, self.factor = model.vae.config.latent_channels, model.vae_factor

    def __call__(self, samples: Any) -> dict[str, Any]:
        """Collate the samples of a batch, and draw for them."""
        collated = self.collate_fn(samples)
        moments = collated.get('lookups', {}).get('moments')
        found = [] if moments is None else [value['mean'] for value in moments.values if value is not None]
        if 'latents' in collated:
            shape = tuple(collated['latents'].shape[1:])
        elif found:
            shape = tuple(found[0].shape)
        elif 'img' in collated:
            shape = self.channels, *(side // self.factor for side in collated['img'].shape[2:])
        else:
            return collated  # the model says what is missing
        if not {'seed', 'key', 'epoch'} <= collated.keys():
            return collated
        draws = rng.Draws(collated['seed'], collated['key'], collated['epoch'])
        return {**collated, 'drawn': self.draw(draws, shape, self.schedule, encodes='latents' not in collated)}


def ahead(batches: Iterator[Any], device: torch.device, seen: Callable[[Any], None] | None = None) -> Iterator[Any]:
    """Return `batches`, each after `seen(batch)`; on CUDA its tensors on `device`, copied while the last step runs."""
    batches = batches if seen is None else _passed(batches, seen)
    return CopiedAhead(batches, device) if device.type == 'cuda' else batches


def _passed(batches: Iterator[Any], seen: Callable[[Any], None]) -> Iterator[Any]:
    for batch in batches:
        seen(batch)
        yield batch


class CopiedAhead(Iterator[Any]):
    """Collated batches on a CUDA device; one is read and copied ahead, on a stream of its own.

    What reading one raises (the end too) is raised in its turn, so that the step before is done.
    """

    def __init__(self, batches: Iterator[Any], device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.stream = torch.cuda.Stream(device)
        self.begun = False

    def __next__(self) -> Any:
        if not self.begun:
            self.begun, self.read = True, self._read()
        if isinstance(self.read, Exception):
            raise self.read
        batch, now = self.read, torch.cuda.current_stream(self.device)
        now.wait_stream(self.stream)
        for tensor in _tensors(batch):
            if tensor.device.type == self.device.type:
                tensor.record_stream(now)  # or its memory would be used again while this step reads it
        self.read = self._read()
        return batch

    def _read(self) -> Any:
        """Return the next batch on the device, or the error that stands in its place."""
        try:
            batch = next(self.batches)
        except Exception as error:
            return error
        with torch.cuda.stream(self.stream):
            return to_device(batch, self.device)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | Lookups):
        parts = value.values if isinstance(value, Lookups) else value.values() if isinstance(value, Mapping) else value
        for part in parts:
            yield from _tensors(part)
