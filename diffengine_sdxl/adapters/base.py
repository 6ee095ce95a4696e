"""What an adapter is: one object that knows how it attaches, what it trains, what it reads and what it adds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffengine_sdxl.structures import Batch, UNetCall, checked_window

Tensors = dict[str, Tensor]


class Adapter(nn.Module):
    """One adapter of a base. Every method has a default; a kind overrides what it needs.

    The model calls, in this order: `attach` for every adapter (in the order of their names; those with `in_base`
    last), `ready` for every adapter, then for each batch `words`, `encode`, `project` and `contribute`. No adapter
    knows of another.

    Args:
        reads: name of the batch's condition that it takes; None if it takes none.
        weights: folder, hub id or file to start from; None for fresh weights.
        trainable: whether its parameters train.
        scale: how strongly it acts; 0 is the base alone.
        window: part of the way from noise (0) to image (1) in which it acts.
    """

    #: Sides of its images must be divisible by this.
    size_divisor = 1
    #: Whether it changes modules of the base itself (LoRA), which others may want to see as they were.
    in_base = False
    #: Whether what it reads lies over the picture, pixel by pixel: such a condition says how large a picture is.
    of_picture_size = False
    #: Where it is attached, in words.
    place = 'beside the base'

    def __init__(self, reads: str | None = None, weights: str | None = None, trainable: bool = True,
                 scale: float = 1.0, window: Sequence[float] = (0.0, 1.0)) -> None:
        super().__init__()
        self.name = ''
        self.reads, self.weights, self.trainable = reads, weights, trainable
        self.scale = scale
        self.window = window  # type: ignore[assignment]

    @property
    def scale(self) -> float:
        """How strongly it acts.

        Raises:
            ValueError: when set, to one that the kind cannot do.
        """
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._check_scale(float(scale))
        self._scale = float(scale)

    def _check_scale(self, scale: float) -> None:
        """Refuse a scale that this kind cannot do."""

    @property
    def window(self) -> tuple[float, float]:
        """Part of the way from noise (0) to image (1) in which it acts.

        Raises:
            ValueError: when set, to one that is none, or that the kind cannot do.
        """
        return self._window

    @window.setter
    def window(self, window: Sequence[float]) -> None:
        checked = checked_window(window)
        self._check_window(checked)
        self._window = checked

    def _check_window(self, window: tuple[float, float]) -> None:
        """Refuse a window that this kind cannot do."""

    @property
    def mask_name(self) -> str:
        """The condition that says where in the picture it acts.

        Raises:
            ValueError: this kind acts everywhere.
        """
        raise ValueError(f"Adapter '{self.name}' ({self.kind}) takes no mask; image prompts (IPAdapter) do.")

    @property
    def kind(self) -> str:
        """What it is, in a word."""
        return type(self).__name__

    def attach(self, model: Any) -> None:
        """Make the parts whose widths depend on `model` (an SDXL) and hook them in. Called with keyed randomness."""

    def ready(self, model: Any) -> None:
        """Called once all adapters are attached."""

    def detach(self, model: Any) -> None:
        """Undo `attach`: the base's outputs are bitwise what they were."""

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, what `attach` put into the base does nothing; the model leaves out `encode` and all after it."""
        return nullcontext()

    def trainables(self) -> list[nn.Parameter]:
        """The parameters that train, wherever they live; empty if the adapter is frozen."""
        return list(self.parameters()) if self.trainable else []

    def owned(self) -> list[nn.Parameter]:
        """All its parameters, frozen ones too, wherever they live."""
        return list(self.parameters())

    def inside(self, part: str) -> Iterable[nn.Parameter]:
        """Those of its own parameters that compute within a call of `part` ('unet', 'text_encoder', ...)."""
        return ()

    def words(self) -> Mapping[str, tuple[Tensor | None, Tensor | None]]:
        """New words for prompts: word -> its vectors [n, D] for each text encoder; None where one has none."""
        return {}

    def read_image(self, image: Image.Image | Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """A condition from a person's RGB picture (several, where a kind takes several), without the batch's B.

        Here a control image, [3, H, W] in [0, 1], resized straight to the picture's `size` (H, W) with Lanczos, as in
        diffusers' pipelines.

        Raises:
            ValueError: several pictures where one is wanted.
        """
        if not isinstance(image, Image.Image):
            raise ValueError(f"Adapter '{self.name}' takes one picture for a prompt; it got {len(image)}.")
        resized = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255).permute(2, 0, 1)

    def encode(self, batch: Batch) -> Tensors:
        """The frozen part: what no step of training changes, so it may be cached.

        Raises:
            ValueError: the batch lacks the condition that this adapter reads.
        """
        return {'condition': self._condition(batch)} if self.reads else {}

    def null(self, tensors: Tensors) -> Tensors:
        """What stands in for a dropped input; the same shapes as `tensors`."""
        return {k: torch.zeros_like(v) for k, v in tensors.items()}

    def uncond(self, tensors: Tensors) -> Tensors:
        """Its rows in the unconditional branch of guidance."""
        return self.null(tensors)

    def project(self, tensors: Tensors) -> Tensors:
        """The trained part that doesn't depend on the denoiser's input: once per training step or sampling loop."""
        return tensors

    def expand(self, tensors: Tensors, branches: Sequence[str]) -> Tensors:
        """`project` for several guidance branches in one call, stacked along the batch in their order."""
        rows = [self.uncond(tensors) if branch == 'uncond' else tensors for branch in branches]
        return self.project({k: torch.cat([r[k] for r in rows]) for k in tensors})

    def contribute(self, call: UNetCall, tensors: Tensors) -> None:
        """Add this adapter's part, with its scale and window, to a call of the UNet."""

    def save(self, folder: str | Path) -> None:
        """Write the weights in the format of the adapter's ecosystem."""
        raise NotImplementedError(f'{type(self).__name__} does not say how it is saved')

    def load(self, source: str | Path) -> None:
        """Read what `save` wrote, in place.

        Raises:
            ValueError: keys or widths don't fit; which ones.
        """
        raise NotImplementedError(f'{type(self).__name__} does not say how it is loaded')

    def to_stock(self, stock: Any) -> None:
        """Add itself, with its weights as they are, to a stock pipeline in the making (a `models.pipeline.Stock`).

        Raises:
            ValueError: stock diffusers has nothing for it, or cannot do one of its settings.
        """
        self._not_in_stock(f'it has nothing for {type(self).__name__}')

    def _not_in_stock(self, why: str) -> NoReturn:
        raise ValueError(f"Adapter '{self.name}' cannot be part of a stock diffusers pipeline: {why}.")

    def _without_window(self) -> None:
        """Refuse a window that stock diffusers has no argument for."""
        if self.window != (0, 1):
            self._not_in_stock(f'it acts in the window {self.window}, and there it would act all the way. Set '
                               'window=(0, 1), or sample here')

    def _condition(self, batch: Batch) -> Tensor:
        if self.reads not in batch.conditions:
            raise ValueError(f"Adapter '{self.name}' reads '{self.reads}', but the samples hold "
                             f'{sorted(batch.conditions) or "no conditions"}. Name the column in the data set '
                             '(conditioning_image_column, extra_columns) or compute it with a transform.')
        return batch.conditions[self.reads]

    def _fixed_scale(self, call: UNetCall, rows: int) -> Tensor | float:
        """Scale times window: a float, or [rows, 1, 1, 1] where the window tells rows apart."""
        gate = call.gate(self.window)
        return self.scale if gate is None else (self.scale * gate).view(rows, 1, 1, 1)
