"""Counts of a training step of a model on the meta device, at any batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffengine_sdxl.adapters.frozen_image_encoder import FrozenImageEncoder
from diffengine_sdxl.commands.plan.counter import WORKSPACE, Rates, counted
from diffengine_sdxl.commands.plan.meta_model import batch_of, reads_images
from diffengine_sdxl.models.compiled import CHECKPOINTING, set_checkpointing
from diffengine_sdxl.models.prompt_branches import ENCODERS
from diffengine_sdxl.models.sdxl import SDXL


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of a micro-batch, or a call of an encoder.

    Attributes:
        kernels, flop, seconds: see Counter.
        saved: bytes that are kept for the backward pass, copies of trained weights among them.
        peak: bytes at the peak, beside what was there before.
        peak_of_others: the same without the gradients, which outlive the pass.
        timeline: bytes of gradients, of workspaces and of all other tensors, each time that one is made or freed.
    """

    kernels: float
    flop: float
    seconds: float
    saved: float
    peak: float
    peak_of_others: float = 0
    timeline: Any = None


@dataclass
class StepCounts:
    """Passes of a step by checkpointing, for any batch size, and what the encoders do for one sample.

    Attributes:
        own: the checkpointing that was counted with two batch sizes; those of other checkpointing grow alike.
        batch_size: the second of them.
        at_one: checkpointing -> the pass of one sample.
        larger: the pass of `own` with `batch_size` samples.
        encoders: name of what a cache makes needless -> the call for one sample.
    """

    own: str
    batch_size: int
    at_one: dict[str, Pass] = field(default_factory=dict)
    larger: Pass = field(default_factory=lambda: Pass(0, 0, 0, 0, 0))
    encoders: dict[str, Pass] = field(default_factory=dict)

    def at(self, batch_size: int, checkpointing: str) -> Pass:
        """Return the pass of a batch."""
        one = self.at_one[checkpointing]
        if batch_size == 1 or (checkpointing, batch_size) == (self.own, self.batch_size):
            return one if batch_size == 1 else self.larger
        more, fixed = batch_size - 1, self.copies
        growth = self._slope('seconds') / self.at_one[self.own].seconds
        gradients, workspaces, others = one.timeline
        others = workspaces + others + more * (others - fixed).clip(min=0)
        return Pass(one.kernels + more * self._slope('kernels'), one.flop * batch_size,
                    one.seconds * (1 + growth * more), one.saved + more * max(0, one.saved - fixed),
                    float(np.max(gradients + others)), float(np.max(others)))

    @property
    def copies(self) -> float:
        """Bytes that a pass keeps whatever the batch: copies of trained weights in the dtype that computes."""
        return max(0.0, self.at_one[self.own].saved - self._slope('saved'))

    def _slope(self, name: str) -> float:
        """Return what each further sample adds."""
        return float(getattr(self.larger, name) - getattr(self.at_one[self.own], name)) / (self.batch_size - 1)


def count(model: SDXL, size: Sequence[int], batch_size: int, rates: Rates, own: str = 'off',
          modes: Iterable[str] = CHECKPOINTING) -> StepCounts:
    """Count the passes of a model of `meta_model.build`.

    Args:
        size: height and width of the images, in pixels.
        batch_size: of the second pass of `own`, so that counts are exact there; at least 2.
        own: the checkpointing to count twice.
        modes: the checkpointing to count.
    """
    counts = StepCounts(own, max(2, batch_size))
    counts.encoders, embeds = _encoders(model, size, rates)
    for mode in dict.fromkeys((own, *modes)):
        set_all_checkpointing(model, mode)
        counts.at_one[mode] = pass_of(model, 1, size, embeds, rates)
        if mode == own:
            counts.larger = pass_of(model, counts.batch_size, size, embeds, rates)
    return counts


def set_all_checkpointing(model: SDXL, mode: str) -> None:
    """Set the checkpointing of the UNet, and of text encoders that train, as `models.apply_speed` does."""
    set_checkpointing(model.unet, mode)
    for part in ENCODERS:
        if part in model.trainable_parts:
            encoder = getattr(model, part)
            (encoder.gradient_checkpointing_enable if mode == 'full' else encoder.gradient_checkpointing_disable)()


def pass_of(model: SDXL, num: int, size: Sequence[int], embeds: Mapping[str, Sequence[int]], rates: Rates | None = None
            ) -> Pass:
    """Count one loss and its backward pass for `num` samples from cached inputs."""
    batch = batch_of(model, num, size, embeds)
    parameters = [p for owned in model.trainables().values() for _, p in owned]
    with counted(rates) as counter:
        losses = model(batch, mode='loss')
        loss: Tensor = sum(value for name, value in losses.items() if 'loss' in name)  # type: ignore[assignment]
        saved = counter.live
        loss.backward()
    timeline = _timeline(counter.history)
    for parameter in parameters:
        parameter.grad = None
    return Pass(counter.kernels, counter.flop, counter.seconds, saved, counter.peak,
                float(np.max(timeline[1] + timeline[2])), timeline)


def _timeline(history: Sequence[tuple[int, int]]) -> Any:
    """Return the bytes of tensors never freed, of workspaces and of other tensors, after each event: [3, N]."""
    numbers, sizes = np.array(history).T
    workspaces, freed = numbers == WORKSPACE, np.isin(numbers, numbers[sizes < 0])
    kinds = np.stack([~freed, workspaces, freed & ~workspaces])
    return np.cumsum(np.where(kinds, sizes, 0), axis=1)


@torch.no_grad()
def _encoders(model: SDXL, size: Sequence[int], rates: Rates) -> tuple[dict[str, Pass], dict[str, tuple[int, ...]]]:
    """Count the frozen encoders that a step from images calls, for one sample.

    Also return the shape of a sample's embeddings for each image prompt.
    """
    calls: dict[str, Pass] = {}
    embeds: dict[str, tuple[int, ...]] = {}
    if not reads_images(model):
        pixels = torch.zeros(1, 3, *size, device='meta', dtype=model.vae.dtype)
        calls['VAE'], _ = _call(rates, model.vae.encode, pixels)
    if not (model.text_trains or model.text_adapted):
        chunks = getattr(model, 'caption_chunks', 1)
        for part in (part for part in ENCODERS if getattr(model, part) is not None):
            encoder = getattr(model, part)
            ids = torch.zeros(chunks, encoder.config.max_position_embeddings, device='meta', dtype=torch.long)
            calls[part], _ = _call(rates, encoder, ids, output_hidden_states=True)
    for adapter in model.adapters.values():
        encoder = getattr(adapter, 'encoder', None)
        if isinstance(encoder, FrozenImageEncoder):
            side = encoder.preprocessing.size
            pixels = torch.zeros(1, 3, side, side, device='meta', dtype=encoder.net.dtype)
            calls[f'image encoder of {adapter.name}'], found = _call(rates, encoder.embed, pixels, adapter.plus)
            embeds[str(adapter.condition_key)] = tuple(found.shape)
    return calls, embeds


def _call(rates: Rates, work: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Pass, Any]:
    """Count a call; also return its result."""
    with counted(rates) as counter:
        result = work(*args, **kwargs)
    return Pass(counter.kernels, counter.flop, counter.seconds, 0, counter.peak), result


def bytes_of(module: nn.Module | Iterable[Tensor]) -> int:
    """Return the bytes of a module's parameters and buffers, or of tensors."""
    tensors = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else module
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
