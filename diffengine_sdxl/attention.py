"""The UNet's attention processors: kernels, IP-Adapter image tokens, probes. The only file that sets processors.

Image tokens are passed with the text, as `(text, [ImageTokens, ...])` in `encoder_hidden_states`, and are never stored
in a processor: gradient checkpointing calls it again in the backward pass, when another call may have come between.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffengine_sdxl.errors import UserError, listed, one_of
from diffengine_sdxl.structures import AttentionProbes, ImageTokens

BACKENDS = ('sdpa', 'xformers')


def set_backend(unet: Any, backend: str) -> None:
    """Compute all attentions of `unet` with torch's scaled dot product ('sdpa') or with 'xformers'.

    Cross-attentions that read image tokens always use torch's.

    Raises:
        UserError: the backend is unknown, or xformers is not installed.
    """
    one_of('attention', backend, BACKENDS)
    if backend == 'xformers':
        attentions = [unet.get_submodule(name) for name in cross_attention_names(unet)]
        prompted = [(a, a.processor) for a in attentions if isinstance(a.processor, ImagePrompts)]
        for attention, processor in prompted:
            attention.set_processor(processor.former)
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            raise UserError("attention='xformers' needs the package xformers and a GPU that it supports; install "
                            f"it (pip install xformers) or set attention='sdpa' ({error}).") from error
        finally:
            for attention, processor in prompted:
                processor.former = attention.processor
                attention.set_processor(processor)


def cross_attention_names(unet: Any) -> list[str]:
    """Return the module names of the cross-attentions of `unet`, in the order of IP-Adapter files.

    That is the order of diffusers' `unet.attn_processors`: down blocks, up blocks, mid block.
    """
    return [name.removesuffix('.processor') for name in unet.attn_processors if name.endswith('attn2.processor')]


@contextmanager
def probed(unet: Any, probes: AttentionProbes | None) -> Iterator[None]:
    """Apply `probes` to the self-attentions of `unet` inside. For sampling only, without gradients.

    Raises:
        UserError: a pattern or a name matches no self-attention of `unet`.
    """
    if probes is None:
        yield
        return
    assert not torch.is_grad_enabled(), 'processors hold state of this call, so a forward pass must not be recomputed'
    names = [n.removesuffix('.processor') for n in unet.attn_processors if n.endswith('attn1.processor')]
    for pattern in (*probes.identity, *probes.recorded):
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"A guidance needs the self-attention '{pattern}', which this UNet does not have; it has "
                            f'{listed(names, 4)}.')
    identity = {name for name in names if any(re.search(pattern, name) for pattern in probes.identity)}
    former = {name: unet.get_submodule(name).processor for name in names if name in identity or name in probes.recorded}
    try:
        for name, processor in former.items():
            unet.get_submodule(name).processor = ProbedAttention(name, processor, probes, name in identity)
        yield
    finally:
        for name, processor in former.items():
            unet.get_submodule(name).processor = processor


class ProbedAttention:
    """Self-attention processor of one call: an identity map for some rows, a recorded map for others.

    Source of the identity: Ahn et al. 2024, perturbed-attention guidance, section 4.2; bitwise diffusers'
    PAGCFGIdentitySelfAttnProcessor2_0.
    """

    def __init__(self, name: str, former: Any, probes: AttentionProbes, identity: bool) -> None:
        self.name, self.former, self.probes, self.identity = name, former, probes, identity
        self.recorded = name in probes.recorded  # compiled code would depend on a name that the call reads

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None) -> Any:
        """[B, L, C] to [B, L, C]."""
        # What SDXL's self-attentions never have.
        assert encoder_hidden_states is None and attention_mask is None and attn.norm_q is None
        assert attn.group_norm is None and attn.spatial_norm is None and not attn.residual_connection
        assert attn.rescale_output_factor == 1
        if self.recorded:
            assert self.probes.anchor is not None
            self.probes.maps[self.name] = _received_attention(attn, hidden_states[self.probes.anchor])
        if not self.identity:
            return self.former(attn, hidden_states)
        rows = self.probes.perturbed
        assert rows is not None and rows.stop == len(hidden_states), 'the perturbed rows are the last'
        regular = self.former(attn, hidden_states[:rows.start])
        return torch.cat([regular, attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states[rows])))])


def _received_attention(attn: Any, hidden: Tensor) -> Tensor:
    """Return the attention that each position receives from all, averaged over heads: [B, L] of mean 1, fp32."""
    query, key = (_heads(layer(hidden), attn.heads) for layer in (attn.to_q, attn.to_k))
    dtype = torch.promote_types(query.dtype, torch.float32)
    total = torch.zeros(hidden.shape[:2], dtype=dtype, device=hidden.device)
    for head in range(attn.heads):  # at 2048 pixels the map of one head takes 67 MB, that of all heads 1.3 GB
        scores = query[:, head].to(dtype) @ key[:, head].to(dtype).transpose(1, 2) * query.shape[-1] ** -0.5
        total += scores.softmax(dim=-1).sum(dim=1)
    return total / attn.heads


def plain_layer(layer: Any) -> Any:
    """Unwrap a layer from peft's LoRA layers."""
    while hasattr(layer, 'base_layer'):
        layer = layer.base_layer
    return layer


@dataclass
class ImageLayers:
    """One adapter's keys and values in one cross-attention.

    Attributes:
        to_k, to_v: project tokens to keys and values.
        weight: of the block in which the attention lies, a key of `ImageTokens.scales`.
        copies: the weights of to_k and to_v in the UNet's dtype, of the last call, where they are stored in another;
            gradients flow through them. All calls of a step see equal copies, also a pass that is recomputed.
    """

    to_k: nn.Linear
    to_v: nn.Linear
    weight: float = 1.0
    copies: tuple[Tensor, Tensor] | None = None

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Return what computes keys and values."""
        return self.copies or (self.to_k.weight, self.to_v.weight)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, 'copies': None}  # those of a training step belong to its graph and cannot be copied


def use_image_prompts(unet: Any, user: str, layers: Mapping[str, ImageLayers]) -> str:
    """Let the cross-attentions read image tokens until every user has called `release`.

    Args:
        user: an adapter's name.
        layers: by the names of the cross-attentions in which its tokens act.

    Returns:
        The key for ImageTokens and `release`: `user`, marked if another model's adapter on this UNet has that name.
    """
    for name in cross_attention_names(unet):
        attention = unet.get_submodule(name)
        if not isinstance(attention.processor, ImagePrompts):
            attention.set_processor(ImagePrompts(attention.processor))
        while user in attention.processor.layers:  # in none or in all of them
            user += "'"
        attention.processor.layers[user] = layers.get(name)
    return user


def release(unet: Any, user: str) -> None:
    """Undo one `use_image_prompts`; the last one restores the former processors, the same objects."""
    for name in cross_attention_names(unet):
        attention = unet.get_submodule(name)
        if isinstance(attention.processor, ImagePrompts):
            attention.processor.layers.pop(user, None)
            if not attention.processor.layers:
                attention.set_processor(attention.processor.former)


class ImagePrompts:
    """Cross-attention processor with decoupled IP-Adapter attention; it has no parameters.

    hidden = attention(q, k(text), v(text)) + sum over images of scale x attention(q, k'(tokens), v'(tokens))

    Source: Ye et al. 2023, IP-Adapter, section 3.2.2; bitwise diffusers' IPAdapterAttnProcessor2_0. Without image
    tokens for this layer, the former processor computes.

    It does not know the name of its attention, nor does a call: code compiled for one block fits all blocks.

    Args:
        former: the processor that it replaces.
    """

    def __init__(self, former: Any) -> None:
        self.former = former
        #: User -> its layers here; None where its tokens do not act.
        self.layers: dict[str, ImageLayers | None] = {}

    def __call__(self, attn: Any, hidden_states: Tensor,
                 encoder_hidden_states: Tensor | tuple[Tensor, list[ImageTokens]] | None = None,
                 attention_mask: Tensor | None = None) -> Any:
        """[B, L, C] to [B, L, C]; the text is [B, S, D]."""
        images: list[tuple[ImageTokens, ImageLayers]] = []
        if isinstance(encoder_hidden_states, tuple):
            encoder_hidden_states, tokens = encoder_hidden_states
            for image in tokens:
                layers = self.layers.get(image.user)
                if layers is not None:
                    images.append((image, layers))
        if not images:
            return self.former(attn, hidden_states, encoder_hidden_states, attention_mask)
        # What SDXL's cross-attentions never have.
        assert attention_mask is None and attn.norm_q is None and not attn.residual_connection
        assert attn.group_norm is None and attn.spatial_norm is None and attn.rescale_output_factor == 1
        query = _heads(attn.to_q(hidden_states), attn.heads)
        key, value = (_heads(layer(encoder_hidden_states), attn.heads) for layer in (attn.to_k, attn.to_v))
        hidden = _attend(query, key, value)
        for image, layers in images:
            hidden = _add_image(hidden, query, image, layers, attn.heads)
        return attn.to_out[1](attn.to_out[0](hidden))


def _add_image(hidden: Tensor, query: Tensor, image: ImageTokens, layers: ImageLayers, heads: int) -> Tensor:
    def attend(tokens: Tensor) -> Tensor:
        key, value = (_heads(functional.linear(tokens.to(weight.dtype), weight), heads).to(query.dtype)
                      for weight in layers.weights)
        return _attend(query, key, value)

    scale = image.scales[layers.weight]
    if image.mask is None:
        return hidden + _scaled(scale, attend(image.tokens))
    for i in range(image.tokens.shape[1]):
        mask = _resize_mask(image.mask[:, i], hidden.shape[1]).to(hidden.dtype)
        hidden = hidden + _scaled(scale, attend(image.tokens[:, i]) * mask)
    return hidden


def _heads(x: Tensor, heads: int) -> Tensor:
    """Split [B, ..., C] into [B, heads, L, C / heads], with L the product of the dimensions between."""
    return x.view(len(x), -1, heads, x.shape[-1] // heads).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend, [B, heads, L, c], and join the heads: [B, L, heads x c]."""
    out = functional.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).reshape(len(out), -1, out.shape[1] * out.shape[3]).to(query.dtype)


def _scaled(scale: Tensor, x: Tensor) -> Tensor:
    """Multiply in at least fp32 and cast back: fp32 scales of rows would promote x."""
    return (x * scale).to(x.dtype)  # in this order: the CPU's kernel rounds a first factor to bf16


def _resize_mask(mask: Tensor, num_queries: int) -> Tensor:
    """Resize a mask of the image's size, [B, H, W], to an attention of `num_queries` positions: [B, queries, 1].

    The UNet halves and rounds up, so halve the image's size until it has that many positions. diffusers'
    IPAdapterMaskProcessor guesses the size from their number only; that is the same if 2 ** levels divide the sides of
    the latents, else it may take 2 x 3 for 1 x 6.
    """
    height, width = mask.shape[-2:]
    while height * width > num_queries:
        height, width = (height + 1) // 2, (width + 1) // 2
    assert height * width == num_queries, 'the adapter checks that a mask has the size of the image'
    # Bicubic without antialiasing, as in diffusers.
    small = functional.interpolate(mask.unsqueeze(0), size=(height, width), mode='bicubic').squeeze(0)
    return small.flatten(1).unsqueeze(-1)


#: Blocks that carry one aspect of an image prompt in SDXL (Wang et al. 2024, InstantStyle, arXiv:2404.02733).
ASPECTS = {'style': ('up_blocks.0.attentions.1',), 'layout': ('down_blocks.2.attentions.1',),
           'style_layout': ('up_blocks.0.attentions.1', 'down_blocks.2.attentions.1')}


def block_scales(unet: Any, blocks: str | Mapping[str, Any] | None) -> dict[str, float]:
    """Return the scale of each cross-attention by name, without those of 0.

    Args:
        blocks: None for 1 everywhere; one of ASPECTS; or as in diffusers' `set_ip_adapter_scale`, with 0 for blocks not
            named: {'down': {'block_2': [0.0, 1.0]}, 'mid': 0.5, 'up': 1.0}.

    Raises:
        UserError: it names blocks that `unet` does not have.
    """
    names = cross_attention_names(unet)
    if blocks is None:
        return dict.fromkeys(names, 1.0)
    # 'up_blocks.0.attentions.1.transformer_blocks.0.attn2' lies in 'up_blocks.0.attentions.1'.
    parents = {name: name.partition('.transformer_blocks.')[0] for name in names}
    attentions = list(dict.fromkeys(parents.values()))
    if isinstance(blocks, Mapping):
        scales = _expand(blocks, attentions)
    elif isinstance(blocks, str) and blocks in ASPECTS:
        scales = dict.fromkeys(ASPECTS[blocks], 1.0)
    else:
        raise UserError(f"blocks={blocks!r} is unknown; choose one of {', '.join(map(repr, ASPECTS))}, or name the "
                        "blocks: {'up': {'block_0': [0.0, 1.0, 0.0]}}.")
    if unknown := sorted(scales.keys() - set(attentions)):
        raise UserError(f"blocks={blocks!r} names {', '.join(unknown)}, which this base does not have; image prompts "
                        f"act in {', '.join(attentions)}.")
    return {name: scales[parent] for name, parent in parents.items() if scales.get(parent)}


def _expand(blocks: Mapping[str, Any], attentions: list[str]) -> dict[str, float]:
    """Expand {'up': {'block_0': [0, 1]}} to {'up_blocks.0.attentions.0': 0.0, 'up_blocks.0.attentions.1': 1.0}."""
    scales: dict[str, float] = {}
    for part, value in blocks.items():
        if part not in ('down', 'mid', 'up'):
            raise UserError(f"blocks names the unknown part '{part}'; choose 'down', 'mid' or 'up'.")
        prefix = f'{part}_blocks.' if part != 'mid' else 'mid_block.'
        by_block = {name.partition('.attentions.')[0]: value for name in attentions if name.startswith(prefix)}
        if isinstance(value, Mapping) and part != 'mid':
            by_block = {prefix + str(block).removeprefix('block_'): entry for block, entry in value.items()}
        for block, entry in by_block.items():
            names = [n for n in attentions if n.startswith(f'{block}.attentions.')] or [f'{block}.attentions.0']
            numbers = list(entry) if isinstance(entry, list | tuple) else [entry] * len(names)
            numbers = numbers * len(names) if len(numbers) == 1 else numbers
            if len(numbers) != len(names) or not all(isinstance(n, int | float) for n in numbers):
                raise UserError(f'blocks gives {block} {entry!r}; it has {len(names)} attentions, so give one number '
                                f'or a list of {len(names)}.')
            scales.update(zip(names, map(float, numbers), strict=True))
    if not any(scales.values()):
        raise UserError(f'blocks={dict(blocks)!r} has no scale other than 0, so the adapter would act nowhere.')
    return scales
