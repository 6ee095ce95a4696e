"""The data that flows: Batch -> Conditioning -> UNetCall.

Shapes: B batch, H x W pixels, h = H / f and w = W / f latents (f = 8 for SDXL's VAE), S text tokens, D text width
(2048 for SDXL), P pooled width (1280). Factor and widths come from the loaded base; nothing here is a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffengine_sdxl.errors import UserError


@dataclass
class Start:
    """What sampling starts from besides noise: an image to continue from, or to repaint in part.

    Attributes:
        image: [B, 3, H, W] in [-1, 1]; or `latents` [B, 4, h, w], scaled, such as another model's.
        mask: [B, 1, H, W], 1 where the image is repainted, else 0; None: everywhere.
        noise: [B, 4, h, w] of deviation 1; None draws it from the samples' seeds.
    """

    image: Tensor | None = None
    latents: Tensor | None = None
    mask: Tensor | None = None
    noise: Tensor | None = None

    @property
    def given(self) -> bool:
        """Whether there is an image, so that sampling does not start from noise only."""
        return self.image is not None or self.latents is not None


@dataclass
class Lookups:
    """The keys that were looked up in the cache for B samples, and the tensors of each entry, None if there is none."""

    keys: list[str]
    values: list[dict[str, Tensor] | None]

    def pin_memory(self) -> Lookups:
        """Pin the tensors, in a data loader's thread."""
        return replace(self, values=[found and {k: t.pin_memory() for k, t in found.items()} for found in self.values])


@dataclass
class Batch:
    """The model's input, on its device, made by the data_preprocessor.

    Attributes:
        text: B prompts.
        time_ids: [B, 6] original height, width, crop top, left, target height, width (pixels).
        key, epoch, seed: what keyed draws depend on (see rng.py); B strings and int64 [B] twice.
        img: [B, 3, H, W] in [-1, 1]; or `latents` [B, 4, h, w], already scaled by the VAE's factor.
        text_embeds, pooled: [B, S, D] and [B, P], if the data set holds the text encoders' outputs.
        text_2, negative_text, negative_text_2, negative_time_ids: as above, for the second encoder and for
            the unconditional branch; None: as the first, and not set.
        conditions: adapter.condition_key -> tensor [B, ...]; a conditioning image is [B, 3, H, W] in [0, 1].
        drop: name -> bool [B] on the CPU; rows whose 'text' or adapter input is replaced by its null.
        weight: [B] factor of each sample's loss; mask: factor of the loss of each pixel, [B, 1, H, W], or of each
            latent, [B, 1, h, w].
        size: height and width of the images to generate, in pixels; None: that of the images or conditions.
        start: what sampling starts from; None: noise.
        prompt_syntax: how the texts are written, of `request.SYNTAXES`; None: captions, plain text cut to the model's
            `caption_chunks`.
        clip_skip: layers of the text encoders that `text` skips besides the last one; None as 0.
        num_skipped: unreadable images that the data set skipped to fill this batch.
        drawn: what the loader's worker drew for the objective, by the names in its `draw`; {}: nothing.
        lookups: what the cache holds of these samples: 'moments' (mean, std [4, h, w]), 'text' (text_embeds [S, D],
            pooled [P]), '<condition_key>' of an image prompt (embeds [n, E] or [n, T, E]). Of samples that it holds
            wholly `img` and image prompts are zeros, or absent if those are all. {}: no cache.
        data_set: name of each sample's data set, if there are several.
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
    prompt_syntax: str | None = None
    clip_skip: int | None = None
    num_skipped: int = 0
    drawn: dict[str, Tensor] = field(default_factory=dict)
    lookups: dict[str, Lookups] = field(default_factory=dict)
    data_set: list[str] | None = None

    def __len__(self) -> int:
        return len(self.text)

    @classmethod
    def names(cls) -> set[str]:
        """Return the field names; every other tensor in a sample dict is a condition."""
        return {f.name for f in fields(cls)}


@dataclass
class Conditioning:
    """What the denoiser is conditioned on: one guidance branch, or several stacked along the batch.

    Attributes:
        text: [B, S, D]; pooled: [B, P]; time_ids: [B, 6].
        adapters: adapter name -> its tensors, each [B, ...].
        projected: the adapters' trained modules have run already (once before sampling); else `SDXL.predict` runs them.
        channels: [B, C, h, w], concatenated to the latents of a UNet with more than 4 input channels (inpainting: the
            mask and the latents of the masked image).
        timestep_cond: [B, C], the embedded guidance scale of a UNet that takes it as an input (a distilled LCM).
        strengths: in training, name of a partner -> [B, 3] on the CPU, see `models.partners`.
    """

    text: Tensor
    pooled: Tensor
    time_ids: Tensor
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    projected: bool = False
    channels: Tensor | None = None
    timestep_cond: Tensor | None = None
    strengths: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, index: slice | Tensor) -> Conditioning:
        """Return the rows that `index` selects along the batch."""
        adapters = {name: {k: t[index] for k, t in tensors.items()} for name, tensors in self.adapters.items()}
        channels, timestep_cond = (None if t is None else t[index] for t in (self.channels, self.timestep_cond))
        return replace(self, text=self.text[index], pooled=self.pooled[index], time_ids=self.time_ids[index],
                       adapters=adapters, channels=channels, timestep_cond=timestep_cond,
                       strengths={name: drawn[index] for name, drawn in self.strengths.items()})


def where(drop: Tensor, null: Tensor, value: Tensor) -> Tensor:
    """Return rows of `null` where `drop` (bool [B]) is set, else rows of `value`, without arithmetic on either."""
    return torch.where(send(drop, value.device).view(-1, *[1] * (value.dim() - 1)), null, value)


@dataclass
class ImageTokens:
    """One IP-Adapter's image tokens in one call of the UNet; read by the processors of `attention`.

    Attributes:
        user: whose they are: the key of its layers in each processor, from `attention.use_image_prompts`.
        tokens: [B, n, T, D], n images of T tokens.
        scales: weight of a block -> the scale there, that weight included: [B, 1, 1]; or [] fp64 on the CPU, which
            as a second factor is read like a Python float, bitwise, but whose value compiled code does not depend on.
        mask: [B, n, H, W] in [0, 1], where in the output each image acts; None: everywhere, with the tokens of all
            images in one attention.
    """

    user: str
    tokens: Tensor
    scales: Mapping[float, Tensor]
    mask: Tensor | None = None


@dataclass
class AttentionProbes:
    """What guidances change and record in the UNet's self-attentions in one call; read by `attention`.

    Attributes:
        identity: regular expressions; in self-attentions whose name matches one, the attention map of the rows
            `perturbed` is the identity.
        recorded: names of self-attentions whose maps of the rows `anchor` are recorded.
        maps: filled by the call: name -> [B, L], the attention that each position receives from all positions, averaged
            over heads; its mean is 1.
    """

    identity: tuple[str, ...] = ()
    perturbed: slice | None = None
    recorded: tuple[str, ...] = ()
    anchor: slice | None = None
    maps: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class UNetCall:
    """One call of the UNet, to which adapters add features, tokens, channels, and offsets of the prompt's embeddings.

    Attributes:
        sample: [B, C, h, w]; timestep: [] or [B].
        progress: [B, 2] on the CPU, begin and end of the solver step, from noise (0) to image (1); in training
            1 - t / T twice.
        text, pooled, time_ids, timestep_cond: as in Conditioning, without what adapters add.
        training: active ranges and scales multiply and never skip, so that the graph is always the same.
        strengths: name of an adapter -> what was drawn for its rows, [B, 3] on the CPU: a factor of its scale, start
            and end of the part of sampling in which it acts; adapters that are not in it act as they are.
    """

    sample: Tensor
    timestep: Tensor
    progress: Tensor
    text: Tensor
    pooled: Tensor
    time_ids: Tensor
    training: bool = False
    timestep_cond: Tensor | None = None
    strengths: Mapping[str, Tensor] = field(default_factory=dict)
    _residuals: list[Tensor] = field(default_factory=list)
    _control: list[Tensor] = field(default_factory=list)
    _images: dict[str, ImageTokens] = field(default_factory=dict)
    _channels: list[Tensor] = field(default_factory=list)
    _passed: list[Tensor] = field(default_factory=list)
    _text: list[Tensor] = field(default_factory=list)
    _pooled: list[Tensor] = field(default_factory=list)

    def gate(self, active_range: tuple[float, float], name: str) -> Tensor | None:
        """Return the factor of each row's scale, [B]; None: 1 for all.

        1 for rows whose step lies inside `active_range` (both bounds included), else 0; times what was drawn for the
        adapter `name`.
        """
        drawn = self.strengths.get(name)
        if tuple(active_range) == (0, 1) and drawn is None:
            return None
        inside = self._inside(active_range)
        if drawn is None and bool(inside.all()) and not self.training:
            return None
        if drawn is not None:
            factor, start, end = drawn.unbind(dim=1)
            inside = factor * (inside & (self.progress[:, 0] >= start) & (self.progress[:, 1] <= end))
        return send(inside, self.sample.device).to(torch.promote_types(self.sample.dtype, torch.float32))

    def skips(self, scale: float, active_range: tuple[float, float]) -> bool:
        """Return whether an adapter changes nothing and need not compute: its scale is 0, or no row is active.

        Never in training. Decided on the CPU, so that nothing waits for the device.
        """
        inactive = tuple(active_range) != (0, 1) and not bool(self._inside(active_range).any())
        return not self.training and (scale == 0 or inactive)

    def _inside(self, active_range: tuple[float, float]) -> Tensor:
        """Return which rows' steps lie inside `active_range`, bool [B] on the CPU."""
        return (self.progress[:, 0] >= active_range[0]) & (self.progress[:, 1] <= active_range[1])

    def add_residuals(self, features: Sequence[Tensor]) -> None:
        """Add feature maps after each down block and the mid block (T2I-Adapter); those of several adapters sum.

        For SDXL: [B, 320, h/2, w/2], [B, 640, h/2, w/2], [B, 1280, h/4, w/4] twice.

        Raises:
            UserError: another adapter added other shapes.
        """
        self._residuals = _sum(self._residuals, [f.to(self.sample.dtype) for f in features], 'feature maps')

    def add_control(self, down: Sequence[Tensor], mid: Tensor) -> None:
        """Add to every skip connection and to the mid block's output (ControlNet); those of several adapters sum.

        Args:
            down: one for each skip connection of the UNet, in its order and shape, or [B, C, 1, 1].
            mid: [B, C, h', w'], or [B, C, 1, 1].

        Raises:
            UserError: another adapter added other shapes.
        """
        self._control = _sum(self._control, [f.to(self.sample.dtype) for f in (*down, mid)], 'control features')

    def add_image_tokens(self, images: ImageTokens) -> None:
        """Let the UNet's cross-attentions also attend to the image tokens of an adapter (IP-Adapter)."""
        assert images.user not in self._images, f"image tokens of '{images.user}' were added twice to one call"
        self._images[images.user] = replace(images, tokens=images.tokens.to(self.sample.dtype))

    def add_text(self, text: Tensor | None = None, pooled: Tensor | None = None) -> None:
        """Add offsets to the prompt's embeddings; those of several adapters sum.

        Every adapter sees the prompt's own embeddings in `text` and `pooled`, so the order of adapters changes nothing,
        even if one moves the prompt towards another: `weight * (other - call.text)`. The sum has the precision of the
        offsets, the result the dtype of the embeddings. An offset of 0 changes nothing. Extra tokens in the text would
        draw attention even if they were 0, and could have no scale; `add_image_tokens` has one.

        Args:
            text: [B, S, D]; 1 in place of B or S is the same offset for all rows or all tokens.
            pooled: [B, P]; 1 in place of B likewise.

        Raises:
            UserError: an offset fits no embeddings of this base.
        """
        for offset, embeds, offsets, what in ((text, self.text, self._text, 'text embeddings'),
                                              (pooled, self.pooled, self._pooled, 'pooled embeddings')):
            if offset is None:
                continue
            if offset.dim() != embeds.dim() or offset.shape[-1] != embeds.shape[-1] or any(
                    side not in (1, whole) for side, whole in zip(offset.shape, embeds.shape, strict=True)):
                raise UserError(f'An adapter adds {list(offset.shape)} to the {what}, which are {list(embeds.shape)}. '
                                'It was made for another base.')
            offsets.append(offset)

    def add_channels(self, channels: Tensor) -> None:
        """Concatenate [B, C, h, w] to the latents, after channels added before."""
        self._channels.append(channels.to(self.sample.dtype))

    def kwargs(self) -> dict[str, Any]:
        """Return the arguments of `UNet2DConditionModel.forward`, with fresh lists: the UNet pops from them."""
        call: dict[str, Any] = {
            'sample': torch.cat([self.sample, *self._channels], dim=1) if self._channels else self.sample,
            'timestep': self.timestep, 'encoder_hidden_states': _shifted(self.text, self._text),
            'added_cond_kwargs': {'text_embeds': _shifted(self.pooled, self._pooled), 'time_ids': self.time_ids}}
        if self.timestep_cond is not None:
            call['timestep_cond'] = self.timestep_cond.to(self.sample.dtype)
        if self._residuals:
            self._passed = list(self._residuals)
            call['down_intrablock_additional_residuals'] = self._passed
        if self._control:
            *down, mid = self._control
            call.update(down_block_additional_residuals=tuple(down), mid_block_additional_residual=mid)
        if self._images:
            # As in diffusers, images are passed with the text. Gradient checkpointing calls the processors again later,
            # and would find another call's images if processors stored them.
            call['encoder_hidden_states'] = (call['encoder_hidden_states'], list(self._images.values()))
        return call

    def check_inputs(self, config: Any) -> None:
        """Check this call against the UNet's config; the UNet would fail in a convolution, or not at all.

        Raises:
            UserError: it takes another number of channels, or its guidance scale as an input.
        """
        num = self.sample.shape[1] + sum(c.shape[1] for c in self._channels)
        if num != config.in_channels:
            raise UserError(f'The UNet takes {config.in_channels} channels and got {num}; one of 9 is for inpainting: '
                            'it needs an image and a mask_image, and cannot be trained here.')
        if config.time_cond_proj_dim is not None and self.timestep_cond is None:
            raise UserError('The UNet takes its guidance scale as input (a distilled LCM) and cannot be trained here. '
                            'Train on a plain SDXL, and add an LCM-LoRA to what you trained.')

    def check_consumed(self) -> None:
        """Check after the call that the UNet used all feature maps; diffusers skips those that don't fit silently.

        Raises:
            UserError: it did not.
        """
        if self._residuals and self._passed:
            shapes = [tuple(f.shape[1:]) for f in self._passed]
            raise UserError(
                f'The UNet used {len(self._residuals) - len(self._passed)} of {len(self._residuals)} feature maps; '
                f'those of shape {shapes} fit none of its blocks at latents of {tuple(self.sample.shape[2:])}. '
                'The adapter was made for another base, or the image size is not divisible.')


def _sum(total: list[Tensor], new: list[Tensor], what: str) -> list[Tensor]:
    if not total:
        return new
    # [B, C, 1, 1] is the same everywhere: what a ControlNet pools.
    if len(total) != len(new) or any(a.shape != b.shape and (a.shape[:2] != b.shape[:2] or (1, 1) not in (
            a.shape[2:], b.shape[2:])) for a, b in zip(total, new, strict=True)):
        raise UserError(f'Two adapters add {what} of different shapes: {[tuple(t.shape) for t in total]} and '
                        f'{[tuple(t.shape) for t in new]}.')
    return [a + b for a, b in zip(total, new, strict=True)]


def _shifted(embeds: Tensor, offsets: Sequence[Tensor]) -> Tensor:
    """Return `embeds` plus all `offsets`, in its dtype; itself if there are none."""
    return (embeds + sum(offsets)).to(embeds.dtype) if offsets else embeds


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return `tensor` on `device`; on CUDA by way of pinned memory, as the host waits for any other copy."""
    if not tensor.is_cuda and torch.device(device).type == 'cuda' and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


#: What the host reads in a training step: in its own memory that waits for nothing.
ON_HOST = ('epoch', 'seed', 'drop', 'drawn.timestep')


Data = TypeVar('Data', 'Batch', Mapping[str, Any])


def to_device(data: Data, device: torch.device | str) -> Data:
    """Return a copy of a Batch, or of what was collated for one, with its tensors on `device`, but for `ON_HOST`."""
    def move(name: str, value: Any) -> Any:
        if name in ON_HOST:
            return value
        if isinstance(value, Tensor):
            return send(value, device)
        if isinstance(value, Start):
            return replace(value, **{f.name: move('start', getattr(value, f.name)) for f in fields(value)})
        if isinstance(value, Lookups):
            return replace(value, values=[move(name, found) for found in value.values])
        return {k: move(f'{name}.{k}', v) for k, v in value.items()} if isinstance(value, Mapping) else value
    if isinstance(data, Batch):
        return replace(data, **{f.name: move(f.name, getattr(data, f.name)) for f in fields(data)})
    return {name: move(name, value) for name, value in data.items()}
