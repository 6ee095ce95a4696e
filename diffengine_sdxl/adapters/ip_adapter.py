"""IP-Adapter: images as prompts, by decoupled keys and values in every cross-attention of the UNet.

Ye et al. 2023, arXiv:2308.06721. The arithmetic is that of diffusers' IPAdapterAttnProcessor2_0, the files are
tencent-ailab/IP-Adapter's (see `formats.ip_adapter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from diffengine_sdxl.adapters import precision
from diffengine_sdxl.adapters.base import Adapter, Tensors
from diffengine_sdxl.adapters.formats import files
from diffengine_sdxl.adapters.formats import ip_adapter as layout
from diffengine_sdxl.adapters.frozen_image_encoder import (
    EncoderSource,
    FrozenImageEncoder,
    encoder_beside,
    encoder_inside,
    release_encoder,
    share_encoder,
)
from diffengine_sdxl.adapters.image_projection import NUM_TOKENS, image_projection
from diffengine_sdxl.attention import (
    ImageLayers,
    block_scales,
    cross_attention_names,
    plain_layer,
    release,
    use_image_prompts,
)
from diffengine_sdxl.cache.rows import by_row
from diffengine_sdxl.errors import UserError, one_of
from diffengine_sdxl.images import clip_pixels
from diffengine_sdxl.loading.deferred import loaded
from diffengine_sdxl.loading.strict import log_loaded
from diffengine_sdxl.protocols import AdapterHost
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.structures import Batch, ImageTokens, UNetCall

#: The repository whose image encoder a fresh IP-Adapter reads through; and, of an architecture and the width that its
#: weights read, the encoder there (CLIP ViT-H, or ViT-bigG).
AUTHORS = 'h94/IP-Adapter'
VIT_H = 'models/image_encoder'
AUTHORS_ENCODERS = {('base', 1024): VIT_H, ('plus', 1280): VIT_H, ('base', 1280): 'sdxl_models/image_encoder',
                    ('plus', 1664): 'sdxl_models/image_encoder'}


@ADAPTERS.register_module()
class IPAdapter(Adapter):
    """Images as prompts. It trains a projection to tokens and, for each cross-attention, the tokens' keys and values.

    Its condition is images as its image encoder takes them, but not normalized: [B, 3, S, S] in [0, 1], or
    [B, n, 3, S, S] for n images a sample; the transform ImagePrompt makes them. A data set may instead deliver the
    encoder's output as '<condition_key>_embeds': [B, E] or [B, n, E], for plus [B, T, E] or [B, n, T, E]. No image is
    a zero embedding, for plus the hidden states of zero pixels; so is the unconditional branch, as in diffusers.

    Args:
        condition_key, weights, trainable, scale, active_range, ignore_keys: see Adapter.
        mask: the condition that masks where in the image it acts, [B, H, W] or [B, 1, H, W] in [0, 1], of the output's
            size; [B, n, H, W] for n images. A gray image packed as RGB counts as one. None: '<condition_key>_mask' if
            the samples hold it, else everywhere.
        subfolder, weight_name, revision: of `weights`, a folder or hub id ('h94/IP-Adapter': 'sdxl_models',
            'ip-adapter_sdxl_vit-h.safetensors').
        image_encoder: folder or hub id of a vision model that transformers loads. None: for fresh weights CLIP ViT-H of
            'h94/IP-Adapter'; else the one near `weights`, or in the base, that gives as many numbers as they read.
        image_encoder_subfolder: of `image_encoder`; None for itself, or its 'image_encoder' or 'models/image_encoder'.
        architecture: 'base', tokens from one embedding of the image; or 'plus', from all its patches.
        num_tokens: per image; None for the weights', or 4 (plus: 16).
        multi_image: n images give n times the tokens ('concat'), or one mean embedding ('average').
        blocks: where it acts: None for everywhere, 'style', 'layout' or 'style_layout' (InstantStyle), or scales as in
            diffusers' `set_ip_adapter_scale`: {'up': {'block_0': [0.0, 1.0, 0.0]}}. Keys and values that act nowhere
            don't train.
        hidden, depth, heads, dim_head, ff_mult: of the resampler of plus; None for the weights', or what suits the
            base (SDXL: 1280, 20 heads). diffusers reads depth=4, dim_head=64 and ff_mult=4 only, and of base
            num_tokens=4 only.

    Raises:
        UserError: an option is unknown; in `attach`, if the encoder or `weights` cannot be loaded, or don't fit.
    """

    brings_precision = True
    attach_point = 'cross-attentions'
    file_formats = ('original', 'diffusers')  # h94's layout, which diffusers shares
    diffusers_call = ("pipeline.load_ip_adapter('{out}', subfolder='', weight_name='ip_adapter.safetensors', "
                      'image_encoder_folder=None), the pipeline with its image_encoder')
    projector: Any
    to_k: Any
    to_v: Any

    def __init__(self, condition_key: str = 'reference', mask: str | None = None, weights: str | None = None,
                 trainable: bool = True, scale: float = 1.0, active_range: Sequence[float] = (0.0, 1.0),
                 subfolder: str | None = None, weight_name: str | None = None, revision: str | None = None,
                 image_encoder: str | None = None, image_encoder_subfolder: str | None = None,
                 architecture: str = 'base', num_tokens: int | None = None, multi_image: str = 'concat',
                 blocks: str | Mapping[str, Any] | None = None, hidden: int | None = None, depth: int = 4,
                 heads: int | None = None, dim_head: int = 64, ff_mult: float = 4,
                 ignore_keys: Sequence[str] = ()) -> None:
        super().__init__(condition_key, weights, trainable, scale, active_range, ignore_keys)
        one_of('architecture', architecture, NUM_TOKENS)
        one_of('multi_image', multi_image, ('concat', 'average'))
        self.mask, self.architecture, self.multi_image, self.blocks = mask, architecture, multi_image, blocks
        self.source = {'subfolder': subfolder, 'weight_name': weight_name, 'revision': revision}
        #: The image encoder and its subfolder; `attach` puts in what is found.
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
        return self.architecture == 'plus'

    @property
    def mask_key(self) -> str:
        """The condition that is its mask: `mask`, or '<condition_key>_mask'."""
        return self.mask or f'{self.condition_key}_mask'

    @property
    def encoder(self) -> FrozenImageEncoder:
        """The image encoder, which belongs to the model: other IP-Adapters may read through it too."""
        return self._encoder[0]

    def attach(self, model: AdapterHost) -> None:
        """Build projection, keys and values for `model`'s widths; fresh keys and values are the base's own."""
        settings: dict[str, Any] = {}
        token_dim = model.unet.config.cross_attention_dim
        if self.weights is not None:
            path, tensors, settings = self._read(self.weights, token_dim, self.ignore_keys, **self.source)
        # In a tuple, or torch would register it here too, and again in every adapter that reads through it.
        source = self._find_encoder(model, settings.get('embed_dim'))
        self._encoder, self.encoder_source = (share_encoder(model, *source, user=self.name),), source
        embed_dim = self.encoder.width(self.plus)
        if settings.get('embed_dim', embed_dim) != embed_dim:
            raise UserError(f"'{self.weights}' reads embeddings of {settings['embed_dim']} numbers; the image encoder "
                            f"'{self.encoder.source}' gives {embed_dim}. Use the encoder that it was trained with.")
        # What trains stays in fp32 beside a half-precision base, but an fp64 model is fp64 throughout.
        weight = model.unet_weight
        dtype = torch.promote_types(weight.dtype, torch.float32) if self.trainable else weight.dtype
        shape = {k: settings.get(k, v) for k, v in self.shape.items()}
        self.projector = image_projection(self.architecture, embed_dim, token_dim, **shape).to(weight.device, dtype)
        self.layers, self.vae_factor = cross_attention_names(model.unet), model.vae_factor
        self.block_scales = block_scales(model.unet, self.blocks)
        self.to_k, self.to_v = (nn.ModuleList(_copy_linear(model.unet.get_submodule(f'{name}.{layer}'), dtype)
                                              for name in self.layers) for layer in ('to_k', 'to_v'))
        if self.weights is not None:
            self._fill(path, tensors)
        self._acting = {name: ImageLayers(to_k, to_v, self.block_scales[name])
                        for name, to_k, to_v in zip(self.layers, self.to_k, self.to_v, strict=True)
                        if name in self.block_scales}
        self._user = use_image_prompts(model.unet, self.name, self._acting)

    def detach(self, model: AdapterHost) -> None:
        """Restore the base's attention processors; drop the image encoder if no other adapter uses it."""
        release(model.unet, self._user)
        release_encoder(model, self.encoder, self.name)
        del self.projector, self.to_k, self.to_v, self._acting, self._encoder

    def trainables(self) -> list[nn.Parameter]:
        """Return the projection, and the keys and values of the blocks in which it acts."""
        if not self.trainable:
            return []
        return [*self.projector.parameters(), *self._acting_weights()]

    def read_image(self, image: Image.Image | Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """Return images as the image encoder takes them, [n, 3, S, S] in [0, 1], whatever the output's `size`."""
        images = [image] if isinstance(image, Image.Image) else list(image)
        if not images:
            raise UserError(f"Adapter '{self.name}' takes one or more images per prompt; it got none.")
        how = self.encoder.preprocessing
        return torch.stack([clip_pixels(i, how.size, how.resample, how.short_edge, how.stretch) for i in images])

    @torch.no_grad()
    def encode(self, batch: Batch) -> Tensors:
        """Return the images' embeddings [B, n, E] or hidden states [B, n, T, E], and the mask [B, n, H, W].

        Raises:
            UserError: images or mask are missing, or of a wrong size or number.
        """
        embeds = batch.conditions.get(f'{self.condition_key}_embeds')
        embeds = self._embed(self._condition(batch)) if embeds is None else self._check_embeds(embeds)
        return self._with_mask(batch, embeds)

    @torch.no_grad()
    def encode_rows(self, batch: Batch) -> Tensors:
        """`encode`, each sample's images alone; those of `batch.lookups` are not read."""
        if f'{self.condition_key}_embeds' in batch.conditions:
            return self.encode(batch)
        lookups = batch.lookups.get(str(self.condition_key))
        embeds = by_row(len(batch), lambda i: {'embeds': self._embed(self._condition(batch)[i:i + 1])[0]},
                        'image_embeds', lookups, self.store, batch.time_ids.device)
        return self._with_mask(batch, embeds['embeds'])

    def _with_mask(self, batch: Batch, embeds: Tensor) -> Tensors:
        if self.multi_image == 'average':
            embeds = embeds.mean(1, keepdim=True)
        masked = self.mask or self.mask_key in batch.conditions
        return {'embeds': embeds, **({'mask': self._mask(batch, embeds.shape[1])} if masked else {})}

    def null(self, tensors: Tensors) -> Tensors:
        """Return the embeddings of no image; the mask stays, as in diffusers."""
        embeds = tensors['embeds']
        return {**tensors, 'embeds': self.encoder.null(self.plus, embeds.shape[1], self.store).expand_as(embeds)}

    def project(self, tensors: Tensors) -> Tensors:
        """Project embeddings to tokens [B, n, T, D]."""
        embeds = tensors['embeds']
        tokens = self.projector(embeds.flatten(0, 1).to(next(self.projector.parameters()).dtype))
        return {'tokens': tokens.unflatten(0, embeds.shape[:2]), **{k: v for k, v in tensors.items() if k == 'mask'}}

    def contribute(self, call: UNetCall, tensors: Tensors) -> None:
        """Add the tokens with their scales; the processors have the layers.

        Raises:
            UserError: the mask hasn't the output's size.
        """
        mask = tensors.get('mask')
        size = tuple(side * self.vae_factor for side in call.sample.shape[-2:])
        if mask is not None and tuple(mask.shape[-2:]) != size:
            raise UserError(f"The mask '{self.mask_key}' of adapter '{self.name}' is {mask.shape[-2]} x "
                            f"{mask.shape[-1]}; it must have the output's size, {size[0]} x {size[1]}.")
        # Training multiplies by any scale, 0 too, so that the graph is always the same.
        if call.skips(self.scale, self.active_range):
            return
        scale = self._fixed_scale(call, len(call.sample))
        scale = scale.view(-1, 1, 1) if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64)
        scales = {weight: scale * weight for weight in set(self.block_scales.values())}
        self._copy_weights(call.sample.dtype)
        call.add_image_tokens(ImageTokens(self._user, tensors['tokens'], scales, mask))

    def _acting_weights(self) -> list[nn.Parameter]:
        """Return the keys and values of the blocks in which it acts."""
        return [p for acting in self._acting.values() for layer in (acting.to_k, acting.to_v)
                for p in layer.parameters()]

    def _copy_weights(self, dtype: torch.dtype) -> None:
        """Give the processors keys and values in the UNet's dtype, if they are stored in another."""
        for layers in self._acting.values():
            layers.copies = None  # before new ones take memory
        weights = self._acting_weights()
        if weights[0].dtype != dtype:
            copies = precision.cast(weights, dtype)
            if not torch.is_grad_enabled():  # a pass of a training step may be recomputed with these
                copies = tuple(copy.requires_grad_(weight.requires_grad)
                               for copy, weight in zip(copies, weights, strict=True))
            for layers, *pair in zip(self._acting.values(), copies[::2], copies[1::2], strict=True):
                layers.copies = pair[0], pair[1]

    def add_to_pipeline(self, stock: Any) -> None:
        """Add an image prompt with its projection, keys and values; masks and images are arguments of the call.

        Raises:
            UserError: it has an active range, averages images, or its encoder gives no `image_embeds`.
        """
        from transformers import CLIPImageProcessorPil
        self._refuse_active_range()
        if self.multi_image == 'average':
            self._unsupported_by_diffusers("multi_image='average', and diffusers concatenates the images' tokens "
                                           "(multi_image='concat')")
        net, how = loaded(self.encoder.net), self.encoder.preprocessing
        if not self.plus and not hasattr(net, 'visual_projection'):
            self._unsupported_by_diffusers(f'its image encoder must give image_embeds, and {type(net).__name__} does '
                                           'not')
        # PIL's, as in `read_image`; the one on torchvision filters differently.
        extractor = CLIPImageProcessorPil(
            size={'height': how.size, 'width': how.size} if how.stretch else
            {'shortest_edge': how.short_edge or how.size},
            crop_size={'height': how.size, 'width': how.size}, resample=Image.Resampling[how.resample.upper()],
            image_mean=list(how.mean), image_std=list(how.std))
        scale = {name: self.scale if weight == 1 else self.scale * weight for name, weight in self.block_scales.items()}
        to_k, to_v = (dict(zip(self.layers, layers, strict=True)) for layers in (self.to_k, self.to_v))
        stock.add_image_prompt(self.name, net, extractor, self.projector, to_k, to_v, scale)

    def save(self, folder: str | Path) -> None:
        """Write `ip_adapter.safetensors`, which diffusers' `load_ip_adapter` reads; without the image encoder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {key: value.detach().cpu().contiguous() for key, value in self._file().items()}
        save_file(tensors, Path(folder) / layout.NAME, metadata={'format': 'pt'})

    def load(self, source: str | Path) -> None:
        """Read an IP-Adapter file, or the folder that holds it, in place.

        Raises:
            UserError: it is of another architecture, a key is missing or unknown, or widths are another base's.
        """
        path, tensors, _ = self._read(source, self.to_k[0].in_features)
        self._fill(path, tensors)

    def _read(self, source: str | Path, token_dim: int, ignore_keys: Sequence[str] = (), **where: Any
              ) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
        """Return a file, its tensors and its settings, which must be possible for this adapter on this base."""
        path = files.find(source, layout.NAMES, **where)
        tensors = layout.flat(files.read(path, ignore_keys=ignore_keys))
        settings = layout.settings(tensors, token_dim, self.shape['dim_head'])
        if settings.get('architecture', self.architecture) != self.architecture:
            raise UserError(f"'{path}' is an IP-Adapter with architecture='{settings['architecture']}'; the config has "
                            f"'{self.architecture}'.")
        if settings.get('token_dim', token_dim) != token_dim:
            raise UserError(f"'{path}' makes tokens of {settings['token_dim']} numbers; the base's text has "
                            f'{token_dim}. It was made for another base.')
        num_tokens = self.shape['num_tokens']
        if num_tokens and settings.get('num_tokens', num_tokens) != num_tokens:
            raise UserError(f"'{path}' makes {settings['num_tokens']} tokens per image; the config has "
                            f'num_tokens={num_tokens}.')
        return path, tensors, settings

    def _find_encoder(self, model: AdapterHost, embed_dim: int | None) -> EncoderSource:
        """Return the image encoder that is named; or one that is found, for weights that read `embed_dim` numbers."""
        source, subfolder = self.encoder_source
        if subfolder is not None:
            return source or AUTHORS, subfolder
        if source is not None:
            return encoder_inside(source)
        if self.weights is None:
            return AUTHORS, VIT_H
        folder, _ = files.locate(self.weights, **self.source)
        found = encoder_beside(folder, model.pretrained, embed_dim, self.plus)
        if found is None:
            theirs = AUTHORS_ENCODERS.get((self.architecture, embed_dim or 0))
            raise UserError(f"Adapter '{self.name}': set image_encoder= to the folder or hub id of the image encoder "
                            f"that '{self.weights}' was trained with. It reads {embed_dim} numbers, and there is no "
                            'image encoder that gives as many near it or in the base.' + (
                                f" The authors' adapters of this width use image_encoder='{AUTHORS}', "
                                f"image_encoder_subfolder='{theirs}'." if theirs else ''))
        return found

    def _file(self) -> Tensors:
        return layout.to_file(self.projector.state_dict(), [layer.weight for layer in self.to_k],
                              [layer.weight for layer in self.to_v])

    @torch.no_grad()
    def _fill(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Copy a file's tensors, once all of them are known to fit."""
        layout.check(path, tensors, self._file())
        state, to_k, to_v = layout.from_file(tensors)
        self.projector.load_state_dict(state)
        for layers, weights in ((self.to_k, to_k), (self.to_v, to_v)):
            for layer, weight in zip(layers, weights, strict=True):
                layer.weight.copy_(weight)
        log_loaded(f"IP-Adapter '{self.name}'", path, len(tensors))

    def _embed(self, pixels: Tensor) -> Tensor:
        """Return [B, n, E] or [B, n, T, E] for images."""
        pixels = pixels.unsqueeze(1) if pixels.dim() == 4 else pixels
        side = self.encoder.preprocessing.size
        if pixels.dim() != 5 or tuple(pixels.shape[2:]) != (3, side, side):
            raise UserError(f"'{self.condition_key}' of adapter '{self.name}' is {tuple(pixels.shape[2:])}; its image "
                            f"encoder takes (3, {side}, {side}). Put dict(type='ImagePrompt', "
                            f"key='{self.condition_key}', size={side}) before the other transforms.")
        embeds = self.encoder.embed(self.encoder.normalize(pixels.flatten(0, 1)), self.plus)
        return embeds.unflatten(0, pixels.shape[:2])

    def _check_embeds(self, embeds: Tensor) -> Tensor:
        """Return the data set's embeddings as [B, n, E] or [B, n, T, E], in the encoder's dtype."""
        num_dims = 3 if self.plus else 2
        batched = embeds.unsqueeze(1) if embeds.dim() == num_dims else embeds
        width = self.encoder.width(self.plus)
        if batched.dim() != num_dims + 1 or batched.shape[-1] != width:
            shape = f'[B, n, T, {width}]' if self.plus else f'[B, n, {width}]'
            raise UserError(f"'{self.condition_key}_embeds' is {tuple(embeds.shape)}; adapter '{self.name}' takes "
                            f"{shape} of the image encoder '{self.encoder.source}'.")
        return batched.to(self.encoder.net.dtype)

    def _mask(self, batch: Batch, num_images: int) -> Tensor:
        mask = batch.conditions.get(self.mask_key)
        if mask is None:
            raise UserError(f"Adapter '{self.name}' needs the mask '{self.mask_key}', but the samples hold "
                            f'{sorted(batch.conditions) or "no conditions"}.')
        mask = mask.unsqueeze(1) if mask.dim() == 3 else mask
        if num_images == 1 and mask.shape[1] == 3:
            mask = mask.mean(1, keepdim=True)
        if mask.dim() != 4 or mask.shape[1] != num_images:
            raise UserError(f"The mask '{self.mask_key}' is {tuple(mask.shape)}; adapter '{self.name}' takes "
                            f'[B, {num_images}, H, W], one for each of its {num_images} images.')
        return mask


def _copy_linear(layer: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """Return a new linear layer with the weight of the base's `layer`, without LoRAs."""
    weight = plain_layer(layer).weight
    new: nn.Linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False, device=weight.device,
                                        dtype=dtype)
    with torch.no_grad():
        new.weight.copy_(weight)
    return new
