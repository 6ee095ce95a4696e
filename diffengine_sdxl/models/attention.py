"""The attention of the UNet: which kernel computes it, and image prompts. The only file that touches processors.

Image prompts travel beside the text, as `(text, [ImageTokens, ...])` in `encoder_hidden_states`, and never lie in a
processor: gradient checkpointing calls a processor again in the backward pass, when another call may have gone by.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffengine_sdxl.structures import ImageTokens, Taps

BACKENDS = ('sdpa', 'xformers')


def set_backend(unet: Any, backend: str) -> None:
    """Let every attention of `unet` run on torch's scaled dot product ('sdpa') or on 'xformers'.

    A cross-attention to which an image prompt speaks is computed by torch's in either case.

    Raises:
        ValueError: no such backend, or xformers is not installed here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention='{backend}' is not known; choose one of {', '.join(BACKENDS)}.")
    if backend == 'xformers':
        users = _take_out(unet)
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            raise ValueError("attention='xformers' needs the package xformers and a GPU that it supports; install "
                             f"it (pip install xformers) or set attention='sdpa'. It said: {error}") from error
        finally:
            for user in users:
                use_image_prompts(unet, user)


def cross_attention_names(unet: Any) -> list[str]:
    """The cross-attentions of `unet` by their modules' names, in the order in which IP-Adapter files number them.

    It is that of diffusers' `unet.attn_processors`: down blocks, up blocks, mid block.
    """
    return [name.removesuffix('.processor') for name in unet.attn_processors if name.endswith('attn2.processor')]


@contextmanager
def tapped(unet: Any, taps: Taps | None) -> Iterator[None]:
    """Inside, the self-attentions that `taps` names do what it asks. For sampling: no gradient goes through.

    Raises:
        ValueError: a pattern or a name is none of a self-attention of `unet`.
    """
    if taps is None:
        yield
        return
    assert not torch.is_grad_enabled(), 'what changes a forward pass lies in modules here, so nothing may be recomputed'
    names = [n.removesuffix('.processor') for n in unet.attn_processors if n.endswith('attn1.processor')]
    found = {name: name in taps.recorded for name in names
             if name in taps.recorded or any(re.search(pattern, name) for pattern in taps.identity)}
    for pattern in (*taps.identity, *taps.recorded):
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"A guidance asks for the self-attention '{pattern}', which this UNet does not have; it "
                             f'has {", ".join(names[:4])} ...')
    attentions = {name: unet.get_submodule(name) for name in found}
    former = {name: attention.processor for name, attention in attentions.items()}
    try:
        for name, attention in attentions.items():
            identity = any(re.search(pattern, name) for pattern in taps.identity)
            attention.processor = Tapped(name, former[name], taps, identity, found[name])
        yield
    finally:
        for name, attention in attentions.items():
            attention.processor = former[name]


class Tapped:
    """The processor of one self-attention during one call: some rows see each place alone, of some the map is noted.

    Source of the first: Ahn et al. 2024, perturbed-attention guidance, section 4.2; bitwise diffusers'
    PAGCFGIdentitySelfAttnProcessor2_0.
    """

    def __init__(self, name: str, former: Any, taps: Taps, identity: bool, record: bool) -> None:
        self.name, self.former, self.taps, self.identity, self.record = name, former, taps, identity, record

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None) -> Any:
        """[B, L, C] to [B, L, C]."""
        # What SDXL's self-attentions never have.
        assert encoder_hidden_states is None and attention_mask is None and attn.norm_q is None
        assert attn.group_norm is None and attn.spatial_norm is None and not attn.residual_connection
        assert attn.rescale_output_factor == 1
        if self.record:
            assert self.taps.anchor is not None
            self.taps.maps[self.name] = _attention_to(attn, hidden_states[self.taps.anchor])
        if not self.identity:
            return self.former(attn, hidden_states)
        rows = self.taps.perturbed
        assert rows is not None and rows.stop == len(hidden_states), 'the perturbed rows are the last'
        kept = self.former(attn, hidden_states[:rows.start])
        alone = attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states[rows])))
        return torch.cat([kept, alone])


def _attention_to(attn: Any, hidden: Tensor) -> Tensor:
    """How much attention each place gets from all places together, the mean over heads: [B, L] of mean 1, fp32."""
    query, key = (_heads(layer(hidden), attn.heads) for layer in (attn.to_q, attn.to_k))
    dtype = torch.promote_types(query.dtype, torch.float32)
    total = torch.zeros(hidden.shape[:2], dtype=dtype, device=hidden.device)
    for head in range(attn.heads):  # at 2048 pixels one head's map takes 67 MB, all of them 1.3 GB
        scores = query[:, head].to(dtype) @ key[:, head].to(dtype).transpose(1, 2) * query.shape[-1] ** -0.5
        total += scores.softmax(dim=-1).sum(dim=1)
    return total / attn.heads


def plain_layer(layer: Any) -> Any:
    """The layer itself, where LoRA's wrappers lie around it."""
    while hasattr(layer, 'base_layer'):
        layer = layer.base_layer
    return layer


def use_image_prompts(unet: Any, user: str) -> None:
    """Let the cross-attentions read image prompts, until every user has called `release`. Nothing else changes."""
    for name in cross_attention_names(unet):
        attention = unet.get_submodule(name)
        if not isinstance(attention.processor, ImagePrompts):
            attention.set_processor(ImagePrompts(name, attention.processor))
        attention.processor.users.append(user)


def release(unet: Any, user: str) -> None:
    """Undo one `use_image_prompts`; the last one puts the former processors back, the same objects."""
    for name in cross_attention_names(unet):
        attention = unet.get_submodule(name)
        if isinstance(attention.processor, ImagePrompts) and user in attention.processor.users:
            attention.processor.users.remove(user)
            if not attention.processor.users:
                attention.set_processor(attention.processor.former)


def _take_out(unet: Any) -> list[str]:
    """Release all users of image prompts; who they were."""
    names = cross_attention_names(unet)
    processor = unet.get_submodule(names[0]).processor if names else None
    users = list(processor.users) if isinstance(processor, ImagePrompts) else []
    for user in users:
        release(unet, user)
    return users


class ImagePrompts:
    """The processor of one cross-attention that image prompts may speak to; it has no parameters.

    hidden = attention(q, k(text), v(text)) + sum over images of scale x attention(q, k'(tokens), v'(tokens))

    Source: Ye et al. 2023, IP-Adapter, section 3.2.2; bitwise diffusers' IPAdapterAttnProcessor2_0. Where nothing
    speaks, the former processor computes.

    Args:
        name: of the cross-attention, by which it finds its layers and scales in ImageTokens.
        former: the processor whose place it takes.
    """

    def __init__(self, name: str, former: Any) -> None:
        self.name, self.former, self.users = name, former, list[str]()

    def __call__(self, attn: Any, hidden_states: Tensor,
                 encoder_hidden_states: Tensor | tuple[Tensor, list[ImageTokens]] | None = None,
                 attention_mask: Tensor | None = None) -> Any:
        """[B, L, C] to [B, L, C]; the text is [B, S, D]."""
        speak: list[ImageTokens] = []
        if isinstance(encoder_hidden_states, tuple):
            encoder_hidden_states, images = encoder_hidden_states
            speak = [image for image in images if self.name in image.scale]
        if not speak:
            return self.former(attn, hidden_states, encoder_hidden_states, attention_mask)
        # What SDXL's cross-attentions never have.
        assert attention_mask is None and attn.norm_q is None and not attn.residual_connection
        assert attn.group_norm is None and attn.spatial_norm is None and attn.rescale_output_factor == 1
        query = _heads(attn.to_q(hidden_states), attn.heads)
        key, value = (_heads(layer(encoder_hidden_states), attn.heads) for layer in (attn.to_k, attn.to_v))
        hidden = _attend(query, key, value)
        for image in speak:
            hidden = self._add(hidden, query, image, attn.heads)
        return attn.to_out[1](attn.to_out[0](hidden))

    def _add(self, hidden: Tensor, query: Tensor, image: ImageTokens, heads: int) -> Tensor:
        def attend(tokens: Tensor) -> Tensor:
            # A trained layer is fp32 beside a half-precision base; autocast, where it is on, casts it back.
            key, value = (_heads(layers[self.name](tokens.to(layers[self.name].weight.dtype)), heads).to(query.dtype)
                          for layers in (image.to_k, image.to_v))
            return _attend(query, key, value)

        scale = image.scale[self.name]
        if image.mask is None:
            return hidden + _scaled(scale, attend(image.tokens))
        for i in range(image.tokens.shape[1]):
            mask = _at(image.mask[:, i], hidden.shape[1]).to(hidden.dtype)
            hidden = hidden + _scaled(scale, attend(image.tokens[:, i]) * mask)
        return hidden


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, ..., C] to [B, heads, L, C / heads], L the product of all between."""
    return x.view(len(x), -1, heads, x.shape[-1] // heads).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, heads, L, c] to [B, L, heads x c]."""
    out = functional.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).reshape(len(out), -1, out.shape[1] * out.shape[3]).to(query.dtype)


def _scaled(scale: float | Tensor, x: Tensor) -> Tensor:
    """In fp32 at least, then back: an fp32 tensor of scales would promote x."""
    return (scale * x).to(x.dtype)


def _at(mask: Tensor, num_queries: int) -> Tensor:
    """A mask of the picture's size, [B, H, W], at the resolution of an attention of `num_queries`: [B, queries, 1].

    The UNet halves and rounds up, so the resolution is the picture's, halved until it has so many places. diffusers'
    IPAdapterMaskProcessor guesses it from their number alone: the same wherever 2 ** levels divide the sides of the
    latents, else it may take 2 x 3 for 1 x 6.
    """
    height, width = mask.shape[-2:]
    while height * width > num_queries:
        height, width = (height + 1) // 2, (width + 1) // 2
    assert height * width == num_queries, 'the adapter checks that a mask has the size of the picture'
    # Bicubic, not antialiased, as diffusers has it.
    small = functional.interpolate(mask.unsqueeze(0), size=(height, width), mode='bicubic').squeeze(0)
    return small.flatten(1).unsqueeze(-1)


#: Blocks that carry one aspect of an image prompt in SDXL (Wang et al. 2024, InstantStyle, arXiv:2404.02733).
ASPECTS = {'style': ('up_blocks.0.attentions.1',), 'layout': ('down_blocks.2.attentions.1',),
           'style_layout': ('up_blocks.0.attentions.1', 'down_blocks.2.attentions.1')}


def block_scales(unet: Any, blocks: str | Mapping[str, Any] | None) -> dict[str, float]:
    """The scale of each cross-attention: name -> number; those of 0 are left out.

    Args:
        blocks: None for 1 everywhere; of ASPECTS; or as in diffusers' `set_ip_adapter_scale`, where what is not named
            is 0: {'down': {'block_2': [0.0, 1.0]}, 'mid': 0.5, 'up': 1.0}.

    Raises:
        ValueError: it names what `unet` does not have.
    """
    names = cross_attention_names(unet)
    if blocks is None:
        return dict.fromkeys(names, 1.0)
    # 'up_blocks.0.attentions.1.transformer_blocks.0.attn2' lies in 'up_blocks.0.attentions.1'.
    there = list(dict.fromkeys(name.partition('.transformer_blocks.')[0] for name in names))
    if isinstance(blocks, str):
        if blocks not in ASPECTS:
            raise ValueError(f"blocks='{blocks}' is not known; choose of {', '.join(map(repr, ASPECTS))}, or name the "
                             "blocks: {'up': {'block_0': [0.0, 1.0, 0.0]}}.")
        scales = dict.fromkeys(ASPECTS[blocks], 1.0)
    elif isinstance(blocks, Mapping):
        scales = _expand(blocks, there)
    else:
        raise ValueError(f"blocks={blocks!r} must be a word or a dict, {{'up': {{'block_0': [0.0, 1.0, 0.0]}}}}.")
    if unknown := sorted(scales.keys() - set(there)):
        raise ValueError(f"blocks={blocks!r} names {', '.join(unknown)}, which this base does not have; image prompts "
                         f"act in {', '.join(there)}.")
    found = {name: scales.get(name.partition('.transformer_blocks.')[0], 0.0) for name in names}
    return {name: scale for name, scale in found.items() if scale}


def _expand(blocks: Mapping[str, Any], there: list[str]) -> dict[str, float]:
    """{'up': {'block_0': [0.0, 1.0]}} to {'up_blocks.0.attentions.0': 0.0, 'up_blocks.0.attentions.1': 1.0}."""
    scales: dict[str, float] = {}
    for part, value in blocks.items():
        if part not in ('down', 'mid', 'up'):
            raise ValueError(f"blocks names '{part}'; its parts are 'down', 'mid' and 'up'.")
        prefix = f'{part}_blocks.' if part != 'mid' else 'mid_block.'
        within: dict[str, Any] = {}
        for name in (n for n in there if n.startswith(prefix)):
            within.setdefault(name.partition('.attentions.')[0], value)
        if isinstance(value, Mapping) and part != 'mid':
            within = {prefix + str(block).removeprefix('block_'): given for block, given in value.items()}
        for block, given in within.items():
            own = [n for n in there if n.startswith(f'{block}.attentions.')] or [f'{block}.attentions.0']
            numbers = list(given) if isinstance(given, list | tuple) else [given] * len(own)
            numbers = numbers * len(own) if len(numbers) == 1 else numbers
            if len(numbers) != len(own) or not all(isinstance(n, int | float) for n in numbers):
                raise ValueError(f'blocks gives {block} {given!r}; it has {len(own)} attentions, so give one number or '
                                 f'a list of {len(own)}.')
            scales.update(zip(own, map(float, numbers), strict=True))
    if not any(scales.values()):
        raise ValueError(f'blocks={dict(blocks)!r} leaves no block in which the adapter acts.')
    return scales
