"""The data that flows: Batch -> Conditioning -> UNetCall.

Shapes: B batch, H x W pixels, h = H / f and w = W / f latents (f = 8 for SDXL's VAE), S text tokens, D text width
(2048 for SDXL), P pooled width (1280). Factor and widths come from the loaded base; nothing here is a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Start:
    """What a sampler begins with besides noise: a picture to go on from, or to repaint in part.

    Attributes:
        image: [B, 3, H, W] in [-1, 1]; or `latents` [B, 4, h, w], scaled, such as another model's.
        mask: [B, 1, H, W], 1 where the picture is repainted, else 0; None: everywhere.
        noise: [B, 4, h, w] of deviation 1; None draws it from the samples' seeds.
    """

    image: Tensor | None = None
    latents: Tensor | None = None
    mask: Tensor | None = None
    noise: Tensor | None = None

    @property
    def given(self) -> bool:
        """Whether there is a picture, so that sampling does not begin with noise alone."""
        return self.image is not None or self.latents is not None


@dataclass
class Batch:
    """What the data_preprocessor hands to the model, on its device.

    Attributes:
        text: B prompts.
        time_ids: [B, 6] original height, width, crop top, left, target height, width (pixels).
        key, epoch, seed: what keyed draws depend on (see rng.py); B strings and int64 [B] twice.
        img: [B, 3, H, W] in [-1, 1]; or `latents` [B, 4, h, w], already scaled by the VAE's factor.
        text_embeds, pooled: [B, S, D] and [B, P], when the data set delivers what the encoders would compute.
        text_2, negative_text, negative_text_2, negative_time_ids: as above, for the second encoder and for
            the unconditional branch; None means "as the first" and "none given".
        conditions: adapter.reads -> tensor [B, ...]; a control image is [B, 3, H, W] in [0, 1].
        drop: name -> bool [B]; rows whose 'text' or adapter input is replaced by its null.
        weight: [B] factor of each sample's loss; mask: factor of the loss of each pixel, [B, 1, H, W], or of each
            latent, [B, 1, h, w].
        size: height and width of the pictures to make, in pixels; None: that of the images or conditions.
        start: what sampling begins with; None: noise.
        syntax: how `text` and the like are written, 'plain' or 'compel'.
        clip_skip: layers of the text encoders that `text` skips besides the last one; None as 0.
        num_skipped: unreadable images that the data set passed over to fill this batch.
    """

    text: list[str]
    time_ids: Tensor
    key: list[str]
    epoch: Tensor
    seed: Tensor
    img: Tensor | None = None
    latents: Tensor | None = None
    text_embeds: Tensor | None = None
    pooled: Tensor | None = None
    text_2: list[str] | None = None
    negative_text: list[str] | None = None
    negative_text_2: list[str] | None = None
    negative_time_ids: Tensor | None = None
    conditions: dict[str, Tensor] = field(default_factory=dict)
    drop: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None
    mask: Tensor | None = None
    size: tuple[int, int] | None = None
    start: Start | None = None
    syntax: str = 'plain'
    clip_skip: int | None = None
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.text)

    @classmethod
    def names(cls) -> set[str]:
        """The names that a sample dict may use for itself; every other tensor in it is a condition."""
        return {f.name for f in fields(cls)}


@dataclass
class Conditioning:
    """One guidance branch, or several stacked along the batch: what the denoiser is told.

    Attributes:
        text: [B, S, D]; pooled: [B, P]; time_ids: [B, 6].
        adapters: adapter name -> its tensors, each [B, ...].
        projected: the adapters' own trained part has run already (once before a sampling loop); otherwise
            `SDXL.predict` runs it.
        channels: [B, C, h, w] beside the latents, for a UNet of more than 4 input channels (inpainting: the mask and
            the latents of what it leaves).
        timestep_cond: [B, C], the guidance scale as a UNet reads it that takes it as an input (a distilled LCM).
    """

    text: Tensor
    pooled: Tensor
    time_ids: Tensor
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    projected: bool = False
    channels: Tensor | None = None
    timestep_cond: Tensor | None = None

    def rows(self, index: slice | Tensor) -> Conditioning:
        """The rows that `index` takes along the batch."""
        adapters = {name: {k: t[index] for k, t in tensors.items()} for name, tensors in self.adapters.items()}
        channels, timestep_cond = (None if t is None else t[index] for t in (self.channels, self.timestep_cond))
        return replace(self, text=self.text[index], pooled=self.pooled[index], time_ids=self.time_ids[index],
                       adapters=adapters, channels=channels, timestep_cond=timestep_cond)


def checked_window(window: Sequence[float]) -> tuple[float, float]:
    """A part of the way from noise (0) to image (1), as (start, end).

    Raises:
        ValueError: it is none.
    """
    try:
        start, end = (float(side) for side in window)
    except (TypeError, ValueError):
        start = end = -1.0
    if not 0 <= start < end <= 1:
        raise ValueError(f'window={window!r} must be (start, end) with 0 <= start < end <= 1.')
    return start, end


def where(drop: Tensor, other: Tensor, kept: Tensor) -> Tensor:
    """Rows of `other` where `drop` (bool [B]) is set, rows of `kept` elsewhere; no arithmetic touches either."""
    return torch.where(drop.view(-1, *[1] * (kept.dim() - 1)), other, kept)


@dataclass
class ImageTokens:
    """One image prompt (IP-Adapter) in one call of the UNet; read by the processors of `models.attention`.

    Attributes:
        tokens: [B, n, T, D], n images of T tokens.
        to_k, to_v: name of a cross-attention ('down_blocks.1.attentions.0.transformer_blocks.0.attn2') -> the linear
            layer that makes its keys or values of tokens.
        scale: name of a cross-attention -> how strongly it acts there: a number, or [B, 1, 1]; a name that is missing:
            not at all.
        mask: [B, n, H, W] in [0, 1], where in the picture each image acts; None: everywhere, all images' tokens in one
            attention.
    """

    tokens: Tensor
    to_k: Mapping[str, Any]
    to_v: Mapping[str, Any]
    scale: Mapping[str, float | Tensor]
    mask: Tensor | None = None


@dataclass
class Taps:
    """What guidances ask of the UNet's self-attentions in one call while sampling; read by `models.attention`.

    Attributes:
        identity: patterns (regular expressions) of the names of self-attentions in which the rows `perturbed` see
            each place alone: attention's map is the identity.
        recorded: names of self-attentions whose maps of the rows `anchor` are wanted.
        maps: filled by the call: name -> [B, places], how much attention each place gets from all places together, the
            mean over heads; its mean is 1.
    """

    identity: tuple[str, ...] = ()
    perturbed: slice | None = None
    recorded: tuple[str, ...] = ()
    anchor: slice | None = None
    maps: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class UNetCall:
    """One call of the UNet, to which each adapter adds its part.

    Attributes:
        sample: [B, C, h, w]; timestep: [] or [B].
        progress: [B, 2] on the CPU, the begin and end of the solver step as parts of the way from noise (0) to
            image (1); in training 1 - t / T twice.
        text, pooled, time_ids: as in Conditioning.
        training: windows and scales multiply and never skip, so the graph is the same every time.
        timestep_cond: as in Conditioning.
    """

    sample: Tensor
    timestep: Tensor
    progress: Tensor
    text: Tensor
    pooled: Tensor
    time_ids: Tensor
    training: bool = False
    timestep_cond: Tensor | None = None
    _residuals: list[Tensor] = field(default_factory=list)
    _control: list[Tensor] = field(default_factory=list)
    _images: dict[str, ImageTokens] = field(default_factory=dict)
    _channels: list[Tensor] = field(default_factory=list)
    _passed: list[Tensor] = field(default_factory=list)

    def gate(self, window: tuple[float, float]) -> Tensor | None:
        """1 for the rows whose step lies inside `window`, else 0, [B]; None where all do.

        A step is inside when it begins at or after the window's start and ends at or before its end.
        """
        if tuple(window) == (0, 1):
            return None
        inside = (self.progress[:, 0] >= window[0]) & (self.progress[:, 1] <= window[1])
        if bool(inside.all()) and not self.training:
            return None
        return inside.to(device=self.sample.device, dtype=torch.promote_types(self.sample.dtype, torch.float32))

    def add_residuals(self, features: Sequence[Tensor]) -> None:
        """Add feature maps after each down block and the mid block (T2I-Adapter); two writers sum.

        For SDXL: [B, 320, h/2, w/2], [B, 640, h/2, w/2], [B, 1280, h/4, w/4] twice.

        Raises:
            ValueError: another writer brought other shapes.
        """
        features = [f.to(self.sample.dtype) for f in features]
        self._residuals = _sum(self._residuals, features, 'feature maps')

    def add_control(self, down: Sequence[Tensor], mid: Tensor) -> None:
        """Add to every skip connection and to the mid block's output (ControlNet); two writers sum.

        Args:
            down: as many as the UNet has skip connections, from the first on, each of its shape. mid: [B, C, h', w'].

        Raises:
            ValueError: another writer brought other shapes.
        """
        self._control = _sum(self._control, [f.to(self.sample.dtype) for f in (*down, mid)], 'control features')

    def add_image_tokens(self, name: str, images: ImageTokens) -> None:
        """Let the UNet's cross-attentions also attend to images (IP-Adapter).

        Raises:
            ValueError: `name` has added its own already.
        """
        if name in self._images:
            raise ValueError(f"The image prompt '{name}' was added twice to one call of the UNet.")
        self._images[name] = replace(images, tokens=images.tokens.to(self.sample.dtype))

    def add_channels(self, channels: Tensor) -> None:
        """Put [B, C, h, w] beside the latents, after what is there already."""
        self._channels.append(channels.to(self.sample.dtype))

    def kwargs(self) -> dict[str, Any]:
        """The arguments of `UNet2DConditionModel.forward`, with fresh lists: the UNet pops from them."""
        added: dict[str, Any] = {'text_embeds': self.pooled, 'time_ids': self.time_ids}
        call: dict[str, Any] = {'sample': torch.cat([self.sample, *self._channels], dim=1) if self._channels
                                else self.sample, 'timestep': self.timestep,
                                'encoder_hidden_states': self.text, 'added_cond_kwargs': added}
        if self.timestep_cond is not None:
            call['timestep_cond'] = self.timestep_cond.to(self.sample.dtype)
        if self._residuals:
            self._passed = list(self._residuals)
            call['down_intrablock_additional_residuals'] = self._passed
        if self._control:
            *down, mid = self._control
            call.update(down_block_additional_residuals=tuple(down), mid_block_additional_residual=mid)
        if self._images:
            # As in diffusers: images travel beside the text. Kept in the processors, gradient checkpointing, which
            # calls them again later, would find another call's.
            call['encoder_hidden_states'] = (self.text, list(self._images.values()))
        return call

    def check_inputs(self, config: Any) -> None:
        """Call before the UNet whose config this is: it would fail in a convolution, or say nothing.

        Raises:
            ValueError: it takes other channels, or its guidance scale as an input.
        """
        have = self.sample.shape[1] + sum(c.shape[1] for c in self._channels)
        if have != config.in_channels:
            raise ValueError(f'The UNet takes {config.in_channels} channels and got {have}; one of 9 was made to '
                             'inpaint: it makes pictures of an image and a mask_image, and cannot be trained here.')
        if config.time_cond_proj_dim is not None and self.timestep_cond is None:
            raise ValueError('The UNet takes its guidance scale as an input (a distilled LCM): it makes pictures, but '
                             'cannot be trained here. Train on a plain SDXL, with an LCM-LoRA beside what it learned.')

    def check_consumed(self) -> None:
        """Call after the UNet: stock leaves a feature map that doesn't fit unused and says nothing.

        Raises:
            ValueError: some feature maps were not used.
        """
        if self._residuals and self._passed:
            shapes = [tuple(f.shape[1:]) for f in self._passed]
            raise ValueError(
                f'The UNet used {len(self._residuals) - len(self._passed)} of {len(self._residuals)} feature maps; '
                f'those of shape {shapes} fit none of its blocks at latents of {tuple(self.sample.shape[2:])}. '
                'The adapter was made for another base, or the size cannot be divided.')


def _sum(present: list[Tensor], new: list[Tensor], what: str) -> list[Tensor]:
    if not present:
        return list(new)
    if [t.shape for t in present] != [t.shape for t in new]:
        raise ValueError(f'Two adapters add {what} of different shapes: {[tuple(t.shape) for t in present]} and '
                         f'{[tuple(t.shape) for t in new]}.')
    return [a + b for a, b in zip(present, new, strict=True)]


def to_device(batch: Batch, device: torch.device | str, non_blocking: bool = True) -> Batch:
    """A copy whose tensors lie on `device`; the keyed numbers (epoch, seed) stay on the CPU."""
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=non_blocking)
        if isinstance(value, Start):
            return replace(value, **{f.name: move(getattr(value, f.name)) for f in fields(value)})
        return {k: move(v) for k, v in value.items()} if isinstance(value, Mapping) else value
    stay = {'epoch', 'seed'}
    return replace(batch, **{f.name: move(getattr(batch, f.name)) for f in fields(batch) if f.name not in stay})
