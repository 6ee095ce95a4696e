"""The interface of an adapter: how it attaches, what it trains, which condition it takes and what it contributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from diffengine_sdxl.adapters.formats import files
from diffengine_sdxl.cache.plan import EntryStore
from diffengine_sdxl.errors import UserError, checked_range
from diffengine_sdxl.loading.strict import log_loaded
from diffengine_sdxl.protocols import AdapterHost
from diffengine_sdxl.structures import Batch, UNetCall

Tensors = dict[str, Tensor]
#: (low, high).
Range = tuple[float, float]
#: A scale at which the change of a weight by 1e-7 is seen in bf16.
LARGE_SCALE = 2.0**17
#: File of the weights of a kind that has no format of its own.
NAME = 'adapter.safetensors'


class Adapter(nn.Module):
    """An adapter of a base model. Every method has a default; a kind overrides what it needs.

    The model calls `attach` for every adapter (by name; those with `modifies_base` last), then for each batch
    `new_tokens`, `encode`, `project` and `contribute`. Adapters don't know of each other.

    Args:
        condition_key: the batch's condition that it takes; None if it takes none.
        weights: folder, hub id or file to start from; None for fresh weights.
        trainable: whether its parameters train.
        scale: its strength; 0 gives the base's output.
        active_range: the part of sampling, from noise (0) to image (1), in which it acts.
        ignore_keys: patterns of keys of the weights' file that are left out on purpose ('*.bias'); each must match one.
    """

    #: Sides of the output images must be divisible by this, in pixels.
    size_divisor = 1
    #: Whether it changes modules of the base itself (LoRA), which other adapters may need unchanged.
    modifies_base = False
    #: Whether it can compute in a base's half precision by itself: for images all its weights are stored so, and those
    #: inside the base need no autocast. Else they stay as they are, and a component that holds some is under autocast.
    brings_precision = False
    #: Whether its condition is aligned with the output image pixel by pixel, and so sets the output's size.
    condition_has_image_size = False
    #: Where it attaches, for the model's summary.
    attach_point = 'beside the base'
    #: The formats that `save` writes, the default first.
    file_formats: tuple[str, ...] = ('original',)
    #: How stock diffusers loads what `save` writes to {out}; '' if it cannot.
    diffusers_call = ''
    #: Where `encode_rows` keeps what it computes; None: nowhere.
    store: EntryStore | None = None

    def __init__(self, condition_key: str | None = None, weights: str | None = None, trainable: bool = True,
                 scale: float = 1.0, active_range: Sequence[float] = (0.0, 1.0),
                 ignore_keys: Sequence[str] = ()) -> None:
        super().__init__()
        self.name = ''
        self.condition_key, self.weights, self.trainable = condition_key, weights, trainable
        self.ignore_keys = ignore_keys
        #: Drawn factor of `scale`, see `set_strength`; 0: it does not act.
        self._strength = 1.0
        self.scale = scale
        self.active_range = active_range  # type: ignore[assignment]

    @property
    def scale(self) -> float:
        """Its strength.

        Raises:
            UserError: on setting, if this kind doesn't support the value.
        """
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._check_scale(float(scale))
        self._scale = float(scale)
        self._apply_scale()

    def _check_scale(self, scale: float) -> None:
        """Refuse a scale that this kind doesn't support."""

    def _apply_scale(self) -> None:
        """Pass a new scale on to modules that hold a copy of it."""

    def check_partner(self, scales: Range, start: Range, end: Range) -> None:
        """Check that a training may draw whether it acts, a factor of its scale, and where it starts and ends to act.

        Args:
            scales, start, end: (low, high).

        Raises:
            UserError: this kind cannot be drawn, or not within these bounds.
        """
        for factor in scales:
            self._check_scale(self.scale * factor)
        self._check_active_range((start[1], end[0]))

    def set_strength(self, strength: float) -> None:
        """Multiply its scale by what was drawn for the coming pass; of kinds with `modifies_base`."""
        if strength != self._strength:
            self._strength = strength
            self._apply_scale()

    @property
    def active_range(self) -> tuple[float, float]:
        """The part of sampling, from noise (0) to image (1), in which it acts.

        Raises:
            UserError: on setting, if the range is invalid or this kind doesn't support it.
        """
        return self._active_range

    @active_range.setter
    def active_range(self, active_range: Sequence[float]) -> None:
        checked = checked_range(active_range)
        self._check_active_range(checked)
        self._active_range = checked

    def _check_active_range(self, active_range: tuple[float, float]) -> None:
        """Refuse an active range that this kind doesn't support."""

    @property
    def mask_key(self) -> str:
        """The condition that masks where in the image it acts.

        Raises:
            UserError: this kind takes no mask.
        """
        raise UserError(f"Adapter '{self.name}' ({self.kind}) takes no mask; only image prompts (IPAdapter) do.")

    @property
    def kind(self) -> str:
        """Its kind, for the summary and for errors."""
        return type(self).__name__

    def attach(self, model: AdapterHost) -> None:
        """Build the modules whose widths depend on `model` and hook them in. Called with keyed randomness."""

    def detach(self, model: AdapterHost) -> None:
        """Undo `attach`: the base's outputs are bitwise what they were."""

    def disabled(self) -> AbstractContextManager[None]:
        """Disable what `attach` put into the base; the model skips `encode` and everything after it."""
        return nullcontext()

    def trainables(self) -> list[nn.Parameter]:
        """Return the parameters that train, wherever they live; none if the adapter is frozen."""
        return list(self.parameters()) if self.trainable else []

    def all_parameters(self) -> list[nn.Parameter]:
        """Return all its parameters, frozen ones too, wherever they live."""
        return list(self.parameters())

    def idle_layers(self) -> list[str]:
        """Return the layers of the base that it should change and doesn't, as they compute in sampling."""
        return []

    def to_compute_dtype(self, dtype: torch.dtype) -> None:
        """Store its weights in the base's half-precision `dtype`, once and for all: for images, not for training."""
        if self.brings_precision:
            self.to(dtype)

    def constants(self) -> Any:
        """Return what its parts in the base compute with besides inputs and weights, for CUDA graphs of the UNet.

        Numbers and strings, which a graph holds as they are; a tensor among them means that no graph can be used.
        """
        return ()

    def new_tokens(self) -> Mapping[str, tuple[Tensor | None, Tensor | None]]:
        """Return new words for prompts: word -> its vectors [n, D] for each text encoder, None where it has none."""
        return {}

    def read_image(self, image: Image.Image | Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """Turn the user's RGB image (or images, if this kind takes several) into a condition, without the batch axis.

        Returns:
            By default a control image, [3, H, W] in [0, 1], resized to the output's `size` (H, W) with Lanczos, as in
            diffusers' pipelines.

        Raises:
            UserError: the number of images is wrong.
        """
        if not isinstance(image, Image.Image):
            raise UserError(f"Adapter '{self.name}' takes one image per prompt; it got {len(image)}.")
        resized = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255).permute(2, 0, 1)

    def encode(self, batch: Batch) -> Tensors:
        """Run the frozen part, which training doesn't change, so that its output may be cached.

        Raises:
            UserError: the batch lacks this adapter's condition.
        """
        return {'condition': self._condition(batch)} if self.condition_key else {}

    def encode_rows(self, batch: Batch) -> Tensors:
        """`encode` for a training: what a frozen network computes is found in `batch.lookups`, or computed row by row.

        Raises:
            UserError: see `encode`.
        """
        return self.encode(batch)

    def null(self, tensors: Tensors) -> Tensors:
        """Return what replaces a dropped condition, of the same shapes as `tensors`."""
        return {k: torch.zeros_like(v) for k, v in tensors.items()}

    def uncond(self, tensors: Tensors) -> Tensors:
        """Return its rows in guidance's unconditional branch."""
        return self.null(tensors)

    def project(self, tensors: Tensors) -> Tensors:
        """Run the trained part that doesn't depend on the UNet's input: once a training step or sampling loop."""
        return tensors

    def expand(self, tensors: Tensors, branches: Sequence[str]) -> Tensors:
        """`project` for several guidance branches in one call, stacked along the batch in their order."""
        rows = [self.uncond(tensors) if branch == 'uncond' else tensors for branch in branches]
        return self.project({k: torch.cat([r[k] for r in rows]) for k in tensors})

    def contribute(self, call: UNetCall, tensors: Tensors) -> None:
        """Add this adapter's part to a call of the UNet, subject to its scale and active range."""

    def save(self, folder: str | Path) -> None:
        """Write the weights in their ecosystem's format; by default the state dict, to adapter.safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({key: value.cpu().contiguous() for key, value in self.state_dict().items()}, Path(folder) / NAME)

    def load(self, source: str | Path) -> None:
        """Read what `save` wrote, in place.

        Raises:
            UserError: keys or shapes don't fit; which ones.
        """
        path = files.find(source, [NAME])
        theirs, ours = files.read(path).tensors, self.state_dict()
        files.refuse(path, unknown=list(theirs.keys() - ours), missing=list(ours.keys() - theirs), of_another_shape=[
            key for key in ours.keys() & theirs if ours[key].shape != theirs[key].shape])
        self.load_state_dict(theirs)
        log_loaded(f"{self.kind} '{self.name}'", path, len(ours))

    def add_to_pipeline(self, stock: Any) -> None:
        """Add itself, with its current weights, to a pipeline (`models.diffusers_pipeline.PipelineBuilder`).

        Raises:
            UserError: diffusers has no such adapter, or doesn't support one of its settings.
        """
        self._unsupported_by_diffusers(f'it does not support {type(self).__name__}')

    def _unsupported_by_diffusers(self, why: str) -> NoReturn:
        raise UserError(f"Adapter '{self.name}' cannot be part of a diffusers pipeline: {why}.")

    def _refuse_active_range(self) -> None:
        """Refuse an active range that diffusers has no argument for."""
        if self.active_range != (0, 1):
            self._unsupported_by_diffusers(f'there it would ignore active_range={self.active_range}. Set '
                                           'active_range=(0, 1), or sample here')

    def _condition(self, batch: Batch) -> Tensor:
        if self.condition_key not in batch.conditions:
            raise UserError(f"Adapter '{self.name}' reads '{self.condition_key}', but the samples hold "
                            f'{sorted(batch.conditions) or "no conditions"}. Name the column in the data set '
                            '(conditioning_image_column, extra_columns) or compute it with a transform.')
        return batch.conditions[self.condition_key]

    def _check_same(self, source: str | Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        """Refuse a source whose settings differ from `ours`, before its weights are copied."""
        differences = [f'{k}={theirs.get(k)} instead of {v}' for k, v in ours.items() if theirs.get(k) != v]
        if differences:
            raise UserError(f"'{source}' does not fit adapter '{self.name}' ({self.kind}): it has "
                            f'{", ".join(differences)}.')

    def _fixed_scale(self, call: UNetCall, rows: int) -> Tensor | float:
        """Scale times active range: a float, or [rows, 1, 1, 1] if only some rows are active."""
        gate = call.gate(self.active_range, self.name)
        return self.scale if gate is None else (self.scale * gate).view(rows, 1, 1, 1)


class ControlAdapter(Adapter):
    """An adapter with a network of diffusers, `net`, that reads a control image of the output's size, in [0, 1]."""

    condition_has_image_size = True
    net: Any

    def detach(self, model: AdapterHost) -> None:
        """Drop the network, which is all there is."""
        del self.net

    def _control_image(self, batch: Batch, channels: int) -> Tensor:
        """Return the control image, [B, channels, H, W].

        Raises:
            UserError: it is missing, or has other channels.
        """
        image = self._condition(batch)
        if image.dim() != 4 or image.shape[1] != channels:
            raise UserError(f"Adapter '{self.name}' takes images of {channels} channels, [B, {channels}, H, W]; "
                            f"'{self.condition_key}' has shape {tuple(image.shape)}.")
        return image

    def uncond(self, tensors: Tensors) -> Tensors:
        """Return the control image: it steers both branches of guidance, as in diffusers."""
        return tensors

    def save(self, folder: str | Path) -> None:
        """Write diffusers' folder: config.json and diffusion_pytorch_model.safetensors."""
        self.net.save_pretrained(str(folder), safe_serialization=True)
