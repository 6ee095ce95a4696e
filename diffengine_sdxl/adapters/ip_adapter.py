"""IP-Adapter: pictures as prompts, by keys and values of their own in every cross-attention of the UNet.

Ye et al. 2023, arXiv:2308.06721. The arithmetic is that of diffusers' IPAdapterAttnProcessor2_0, the files are
tencent-ailab/IP-Adapter's (see `formats.ip_adapter`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from diffengine_sdxl import rng
from diffengine_sdxl.adapters.base import Adapter, Tensors
from diffengine_sdxl.adapters.formats import files
from diffengine_sdxl.adapters.formats import ip_adapter as layout
from diffengine_sdxl.adapters.projectors import VARIANTS, PictureEncoder, load_encoder, projector
from diffengine_sdxl.models.attention import (
    block_scales,
    cross_attention_names,
    plain_layer,
    release,
    use_image_prompts,
)
from diffengine_sdxl.pictures import clip_pixels
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.structures import Batch, ImageTokens, UNetCall
from diffengine_sdxl.weights import told

SEVERAL = ('concat', 'average')


@ADAPTERS.register_module()
class IPAdapter(Adapter):
    """Pictures as prompts. Trained are a projector and, for each cross-attention, keys and values of its tokens.

    It reads pictures as its image encoder takes them, but not normalised: [B, 3, S, S] in [0, 1], or [B, n, 3, S, S]
    for n pictures a sample; the transform ImagePrompt makes them. A data set may deliver what the encoder would compute
    as '<reads>_embeds': [B, E] or [B, n, E], for plus [B, T, E] or [B, n, T, E]. No picture is a zero embedding, for
    plus the hidden states of zero pixels; so is the unconditional branch, as in diffusers.

    Args:
        reads, weights, trainable, scale, window: see Adapter.
        mask: name of the condition that says where in the picture it acts (None: everywhere, unless the samples hold
            '<reads>_mask'): [B, H, W] or [B, 1, H, W] in [0, 1], of the
            picture's size; [B, n, H, W] for n pictures. A gray picture packed as RGB counts as one.
        subfolder, weight_name, revision: of `weights`, when it is a folder or hub id ('h94/IP-Adapter': 'sdxl_models',
            'ip-adapter_sdxl_vit-h.safetensors').
        image_encoder, image_encoder_subfolder: folder or hub id of a vision model that transformers loads.
        variant: 'base', tokens from one embedding of the picture; or 'plus', from all its patches.
        num_tokens: for a picture; None takes the weights', or 4 (plus: 16).
        several: what n pictures are: 'concat', n times the tokens, or 'average', the mean of their embeddings.
        blocks: where it acts: None for everywhere, 'style', 'layout' or 'style_layout' (InstantStyle), or scales as in
            diffusers' `set_ip_adapter_scale`: {'up': {'block_0': [0.0, 1.0, 0.0]}}. Keys and values that act nowhere
            don't train.
        hidden, depth, heads, dim_head, ff_mult: of the resampler of plus; None takes the weights', or what suits the
            base (SDXL: 1280, 20 heads). Stock diffusers reads depth=4, dim_head=64 and ff_mult=4 only, and of base
            num_tokens=4 only.

    Raises:
        ValueError: an option is unknown; in `attach`, if the encoder or `weights` cannot be loaded, or don't fit.
    """

    place = 'cross-attentions'
    projector: Any
    to_k: Any
    to_v: Any

    def __init__(self, reads: str = 'reference', mask: str | None = None, weights: str | None = None,
                 trainable: bool = True, scale: float = 1.0, window: Sequence[float] = (0.0, 1.0),
                 subfolder: str | None = None, weight_name: str | None = None, revision: str | None = None,
                 image_encoder: str = 'h94/IP-Adapter', image_encoder_subfolder: str | None = 'models/image_encoder',
                 variant: str = 'base', num_tokens: int | None = None, several: str = 'concat',
                 blocks: str | Mapping[str, Any] | None = None, hidden: int | None = None, depth: int = 4,
                 heads: int | None = None, dim_head: int = 64, ff_mult: float = 4) -> None:
        super().__init__(reads, weights, trainable, scale, window)
        for key, value, known in (('variant', variant, VARIANTS), ('several', several, SEVERAL)):
            if value not in known:
                raise ValueError(f'IPAdapter: {key}={value!r} is not known; choose of {", ".join(map(repr, known))}.')
        self.mask, self.variant, self.several, self.blocks = mask, variant, several, blocks
        self.source = {'subfolder': subfolder, 'weight_name': weight_name, 'revision': revision}
        self.encoder_source = (image_encoder, image_encoder_subfolder)
        self.shape: dict[str, Any] = {'num_tokens': num_tokens, 'hidden': hidden, 'depth': depth, 'heads': heads,
                                      'dim_head': dim_head, 'ff_mult': ff_mult}

    @property
    def kind(self) -> str:
        """'IPAdapter' or 'IPAdapter plus'."""
        return type(self).__name__ + (' plus' if self.plus else '')

    @property
    def plus(self) -> bool:
        """Whether it reads hidden states."""
        return self.variant == 'plus'

    @property
    def mask_name(self) -> str:
        """The condition that is its mask: `mask`, or without one '<reads>_mask', where the samples hold that."""
        return self.mask or f'{self.reads}_mask'

    @property
    def encoder(self) -> PictureEncoder:
        """The image encoder, which belongs to the model: another IP-Adapter may read through it too."""
        return self._encoder[0]

    def attach(self, model: Any) -> None:
        """Build projector, keys and values for `model`'s widths; fresh keys and values are the base's own."""
        found: dict[str, Any] = {}
        token_dim = model.unet.config.cross_attention_dim
        if self.weights is not None:
            path = files.find(self.weights, layout.NAMES, **self.source)
            tensors = layout.flat(files.read(path))
            found = self._fitting(path, tensors, token_dim)
        # In a tuple, or it would be registered here too, and again in every other adapter that reads through it.
        self._encoder = (_shared_encoder(model, *self.encoder_source, user=self.name),)
        embed_dim = self.encoder.width(self.plus)
        if found.get('embed_dim', embed_dim) != embed_dim:
            raise ValueError(f"'{self.weights}' reads embeddings of {found['embed_dim']} numbers; the image encoder "
                             f"'{self.encoder.source}' gives {embed_dim}. Name the one that it was trained with.")
        # What trains stays in fp32 beside a half-precision base, but an fp64 model is fp64 throughout.
        base = model.unet_weight
        dtype = torch.promote_types(base.dtype, torch.float32) if self.trainable else base.dtype
        shape = {**self.shape, **{k: v for k, v in found.items() if k in self.shape}}
        self.projector = projector(self.variant, embed_dim, token_dim, **shape).to(base.device, dtype)
        self.layers, self.vae_factor = cross_attention_names(model.unet), model.vae_factor
        self.acts = block_scales(model.unet, self.blocks)
        self.to_k, self.to_v = (nn.ModuleList(_like(model.unet.get_submodule(f'{name}.{layer}'), dtype)
                                              for name in self.layers) for layer in ('to_k', 'to_v'))
        if self.weights is not None:
            self._fill(path, tensors)
        use_image_prompts(model.unet, self.name)

    def detach(self, model: Any) -> None:
        """Put the base's attention processors back, and let the image encoder go if no other adapter reads by it."""
        release(model.unet, self.name)
        _release_encoder(model, self.encoder, self.name)
        del self.projector, self.to_k, self.to_v, self._encoder

    def trainables(self) -> list[nn.Parameter]:
        """The projector, and the keys and values of the blocks in which it acts."""
        if not self.trainable:
            return []
        acting = [p for name, *own in zip(self.layers, self.to_k, self.to_v, strict=True) if name in self.acts
                  for layer in own for p in layer.parameters()]
        return [*self.projector.parameters(), *acting]

    def inside(self, part: str) -> Iterable[nn.Parameter]:
        """Keys and values compute in the UNet."""
        return [*self.to_k.parameters(), *self.to_v.parameters()] if part == 'unet' else ()

    def read_image(self, image: Image.Image | Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """Pictures as the image encoder takes them, [n, 3, S, S] in [0, 1], whatever the `size` of what is made."""
        images = [image] if isinstance(image, Image.Image) else list(image)
        if not images:
            raise ValueError(f"Adapter '{self.name}' takes one picture or several for a prompt; it got none.")
        how = self.encoder.preparation
        return torch.stack([clip_pixels(i, how.size, how.resample, how.short_edge, how.stretch) for i in images])

    @torch.no_grad()
    def encode(self, batch: Batch) -> Tensors:
        """Embeddings [B, n, E] or hidden states [B, n, T, E] of the pictures, and the mask [B, n, H, W].

        Raises:
            ValueError: picture or mask is missing, or of another size or number.
        """
        embeds = batch.conditions.get(f'{self.reads}_embeds')
        embeds = self._look(self._condition(batch)) if embeds is None else self._given(embeds)
        if self.several == 'average':
            embeds = embeds.mean(1, keepdim=True)
        masked = self.mask or self.mask_name in batch.conditions
        return {'embeds': embeds, **({'mask': self._mask(batch, embeds.shape[1])} if masked else {})}

    def null(self, tensors: Tensors) -> Tensors:
        """No picture; a mask stays, as in diffusers."""
        embeds = tensors['embeds']
        return {**tensors, 'embeds': self.encoder.null(self.plus, embeds.shape[1]).expand_as(embeds)}

    def project(self, tensors: Tensors) -> Tensors:
        """Embeddings to tokens [B, n, T, D]."""
        embeds = tensors['embeds']
        tokens = self.projector(embeds.flatten(0, 1).to(next(self.projector.parameters()).dtype))
        return {'tokens': tokens.unflatten(0, embeds.shape[:2]), **{k: v for k, v in tensors.items() if k == 'mask'}}

    def contribute(self, call: UNetCall, tensors: Tensors) -> None:
        """Add the tokens with their layers and scales.

        Raises:
            ValueError: the mask has another size than the picture.
        """
        mask = tensors.get('mask')
        size = tuple(side * self.vae_factor for side in call.sample.shape[-2:])
        if mask is not None and tuple(mask.shape[-2:]) != size:
            raise ValueError(f"The mask '{self.mask_name}' of adapter '{self.name}' is {mask.shape[-2]} x "
                             f'{mask.shape[-1]}; it must have the size of the picture, {size[0]} x {size[1]}.')
        scale = self._fixed_scale(call, len(call.sample))
        if isinstance(scale, Tensor):
            scale = scale.view(-1, 1, 1)
        # In training it is multiplied, whatever it is, so that the graph is always the same.
        if not call.training and not (bool(scale.any()) if isinstance(scale, Tensor) else scale):
            return
        scales = {name: scale if weight == 1 else scale * weight for name, weight in self.acts.items()}
        to_k, to_v = (dict(zip(self.layers, own, strict=True)) for own in (self.to_k, self.to_v))
        call.add_image_tokens(self.name, ImageTokens(tensors['tokens'], to_k, to_v, scales, mask))

    def to_stock(self, stock: Any) -> None:
        """An image prompt with its projector, keys and values; masks and pictures are arguments of the call.

        Raises:
            ValueError: it has a window, averages pictures, or its encoder gives no `image_embeds`.
        """
        from transformers import CLIPImageProcessorPil
        self._without_window()
        if self.several == 'average':
            self._not_in_stock("several='average', and there pictures are put side by side (several='concat')")
        net, how = self.encoder.net, self.encoder.preparation
        if not self.plus and not hasattr(net, 'visual_projection'):
            self._not_in_stock(f'{type(net).__name__} gives no image_embeds, which it asks of an image encoder')
        # As `read_image` does it: on PIL; the one on torchvision filters otherwise.
        short = how.short_edge or how.size
        extractor = CLIPImageProcessorPil(
            size={'height': how.size, 'width': how.size} if how.stretch else {'shortest_edge': short},
            crop_size={'height': how.size, 'width': how.size}, resample=Image.Resampling[how.resample.upper()],
            image_mean=list(how.mean), image_std=list(how.std))
        to_k, to_v = (dict(zip(self.layers, own, strict=True)) for own in (self.to_k, self.to_v))
        scale = {name: self.scale if weight == 1 else self.scale * weight for name, weight in self.acts.items()}
        stock.add_image_prompt(self.name, net, extractor, self.projector, to_k, to_v, scale)

    def save(self, folder: str | Path) -> None:
        """Write `ip_adapter.safetensors`, which stock's `load_ip_adapter` reads; the image encoder is not in it."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {key: value.detach().cpu().contiguous() for key, value in self._file().items()}
        save_file(tensors, Path(folder) / layout.NAME, metadata={'format': 'pt'})

    def load(self, source: str | Path) -> None:
        """Read an IP-Adapter file, or the folder that holds it, in place.

        Raises:
            ValueError: it is of another kind, a key is missing or misnamed, or widths are another base's.
        """
        path = files.find(source, layout.NAMES)
        tensors = layout.flat(files.read(path))
        self._fitting(path, tensors, self.to_k[0].in_features)
        self._fill(path, tensors)

    def _fitting(self, path: Path, tensors: Mapping[str, Tensor], token_dim: int) -> dict[str, Any]:
        """What the file says of itself, if that can be this adapter on this base."""
        found = layout.settings(tensors, token_dim, self.shape['dim_head'])
        if found.get('variant', self.variant) != self.variant:
            raise ValueError(f"'{path}' is an IP-Adapter {found['variant']}; the config says variant='{self.variant}'.")
        if found.get('token_dim', token_dim) != token_dim:
            raise ValueError(f"'{path}' makes tokens of {found['token_dim']} numbers; the base's text has {token_dim}. "
                             'It was made for another base.')
        wanted = self.shape['num_tokens']
        if wanted and found.get('num_tokens', wanted) != wanted:
            raise ValueError(f"'{path}' makes {found['num_tokens']} tokens of a picture; the config says "
                             f'num_tokens={wanted}.')
        return found

    def _file(self) -> Tensors:
        return layout.to_file(self.projector.state_dict(), [layer.weight for layer in self.to_k],
                              [layer.weight for layer in self.to_v])

    @torch.no_grad()
    def _fill(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Copy a file's tensors, once it is clear that all of them fit."""
        layout.check(path, tensors, self._file())
        state, to_k, to_v = layout.from_file(tensors)
        self.projector.load_state_dict(state)
        for layers, weights in ((self.to_k, to_k), (self.to_v, to_v)):
            for layer, weight in zip(layers, weights, strict=True):
                layer.weight.copy_(weight)
        told(f"IP-Adapter '{self.name}'", path, len(tensors))

    def _look(self, pixels: Tensor) -> Tensor:
        """[B, n, E] or [B, n, T, E] of pictures."""
        pixels = pixels.unsqueeze(1) if pixels.dim() == 4 else pixels
        side = self.encoder.preparation.size
        if pixels.dim() != 5 or tuple(pixels.shape[2:]) != (3, side, side):
            raise ValueError(f"'{self.reads}' of adapter '{self.name}' is {tuple(pixels.shape[2:])}; its image encoder "
                             f"takes (3, {side}, {side}). Put dict(type='ImagePrompt', key='{self.reads}', "
                             f'size={side}) before the other transforms.')
        embeds = self.encoder.embed(self.encoder.normalised(pixels.flatten(0, 1)), self.plus)
        return embeds.unflatten(0, pixels.shape[:2])

    def _given(self, embeds: Tensor) -> Tensor:
        """The same, from what the data set delivers."""
        single = 3 if self.plus else 2
        shaped = embeds.unsqueeze(1) if embeds.dim() == single else embeds
        width = self.encoder.width(self.plus)
        if shaped.dim() != single + 1 or shaped.shape[-1] != width:
            shape = f'[B, n, T, {width}]' if self.plus else f'[B, n, {width}]'
            raise ValueError(f"'{self.reads}_embeds' is {tuple(embeds.shape)}; adapter '{self.name}' takes {shape} of "
                             f"the image encoder '{self.encoder.source}'.")
        return shaped.to(self.encoder.net.dtype)

    def _mask(self, batch: Batch, num_images: int) -> Tensor:
        mask = batch.conditions.get(self.mask_name)
        if mask is None:
            raise ValueError(f"Adapter '{self.name}' acts within the mask '{self.mask_name}', but the samples hold "
                             f'{sorted(batch.conditions) or "no conditions"}.')
        mask = mask.unsqueeze(1) if mask.dim() == 3 else mask
        if num_images == 1 and mask.shape[1] == 3:
            mask = mask.mean(1, keepdim=True)
        if mask.dim() != 4 or mask.shape[1] != num_images:
            raise ValueError(f"The mask '{self.mask_name}' is {tuple(mask.shape)}; adapter '{self.name}' takes "
                             f'[B, {num_images}, H, W], one for each of its {num_images} images.')
        return mask


def _like(layer: Any, dtype: torch.dtype) -> nn.Linear:
    """A linear layer of its own, with the weight of the base's `layer` as it is without LoRA."""
    weight = plain_layer(layer).weight
    new: nn.Linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False, device=weight.device,
                                        dtype=dtype)
    with torch.no_grad():
        new.weight.copy_(weight)
    return new


def _shared_encoder(model: Any, source: str, subfolder: str | None, user: str) -> PictureEncoder:
    """The image encoder of that source, loaded once for all adapters of `model`, in whose `shared` it is registered."""
    if not hasattr(model, 'shared'):
        model.shared = nn.ModuleDict()
    name = f'image_encoder_{rng.key_seed(source, subfolder or "")}'
    if name not in model.shared:
        model.shared[name] = load_encoder(source, subfolder, model.unet_weight.dtype).to(model.unet_weight.device)
    encoder: PictureEncoder = model.shared[name]
    encoder.users.append(user)
    return encoder


def _release_encoder(model: Any, encoder: PictureEncoder, user: str) -> None:
    encoder.users.remove(user)
    if not encoder.users:
        for name in [n for n, shared in model.shared.items() if shared is encoder]:
            del model.shared[name]
