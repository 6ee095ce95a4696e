"""From pictures to tokens: the frozen image encoder that IP-Adapters read through, and their projectors."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from mmengine.logging import print_log
from PIL import Image
from torch import Tensor, nn

from diffengine_sdxl import hub, rng
from diffengine_sdxl.adapters.image_encoder import MEAN, STD
from diffengine_sdxl.weights import load_pretrained, said, shipped

VARIANTS = ('base', 'plus')
NUM_TOKENS = {'base': 4, 'plus': 16}


def projector(variant: str, embed_dim: int, token_dim: int, num_tokens: int | None = None, hidden: int | None = None,
              depth: int = 4, heads: int | None = None, dim_head: int = 64, ff_mult: float = 4) -> nn.Module:
    """The network from what the image encoder gives to tokens; diffusers' own classes, freshly initialised.

    Args:
        variant: 'base', one embedding [N, E] to tokens by a linear layer and a norm (Ye et al. 2023, section 3.2.1);
            'plus', all hidden states [N, T, E] by a perceiver resampler (tencent-ailab/IP-Adapter, resampler.py).
        embed_dim, token_dim: E, and the width of the UNet's text.
        num_tokens: 4, or 16 for plus.
        hidden, depth, heads, dim_head, ff_mult: of the resampler; None takes 1280, or `token_dim` where that is
            smaller, and as many heads as fit into it.

    Returns:
        A module whose output is [N, num_tokens, token_dim].
    """
    from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
    tokens = num_tokens or NUM_TOKENS[variant]
    if variant == 'base':
        return ImageProjection(embed_dim, token_dim, tokens)
    hidden = hidden or min(1280, token_dim)
    return IPAdapterPlusImageProjection(embed_dim, token_dim, hidden, depth, dim_head,
                                        heads or max(1, hidden // dim_head), tokens, ff_mult)


@dataclass(frozen=True)
class Preparation:
    """What an image encoder expects of a picture: the options of `clip_pixels`, and mean and std of its channels."""

    size: int
    resample: str = 'bicubic'
    short_edge: int | None = None
    stretch: bool = False
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def of(cls, settings: Mapping[str, Any], size: int, source: str) -> Preparation:
        """From a preprocessor_config.json of transformers; CLIP's for what it leaves open.

        Args:
            settings: of the file; empty where there is none. size: the encoder's own, for that case.

        Raises:
            ValueError: it makes pictures that are not square.
        """
        def sides(name: str) -> tuple[Any, bool]:
            """The number, and whether it is the short edge only."""
            value = settings.get(name)
            if not isinstance(value, Mapping):
                return value, True
            short = value.get('shortest_edge')
            if short is None and value.get('height') != value.get('width'):
                raise ValueError(f"The image encoder '{source}' takes pictures with {name}={dict(value)}; only square "
                                 'ones are supported.')
            return (value['height'], False) if short is None else (short, True)

        scaled, is_short = sides('size')
        cut, _ = sides('crop_size')
        if scaled is None or not settings.get('do_center_crop', is_short):
            cut = None
            if is_short and scaled is not None:
                raise ValueError(f"The image encoder '{source}' takes pictures of any proportions "
                                 '(do_center_crop=false); only square ones are supported.')
        scaled = scaled or size
        cut = cut or scaled
        normal = settings.get('do_normalize', True)
        return cls(cut, Image.Resampling(settings.get('resample', 3)).name.lower(), scaled if scaled > cut else None,
                   not is_short, tuple(settings.get('image_mean') or MEAN) if normal else (0.0,) * 3,
                   tuple(settings.get('image_std') or STD) if normal else (1.0,) * 3)


class PictureEncoder(nn.Module):
    """A frozen image encoder of transformers, with the preparation of its pictures.

    Args:
        net: CLIPVisionModelWithProjection, or any vision model with `hidden_states` [N, T, E] and, for `embed`,
            `image_embeds` or `pooler_output` [N, E].
        preparation: see there. source: where it comes from, for errors.
    """

    def __init__(self, net: Any, preparation: Preparation, source: str) -> None:
        super().__init__()
        self.net, self.preparation, self.source = net.eval().requires_grad_(False), preparation, source
        #: The adapters that read through it.
        self.users: list[str] = []
        self._null: dict[int, Tensor] = {}

    def width(self, hidden: bool) -> int:
        """E, of hidden states or of embeddings."""
        if not hidden and hasattr(self.net, 'visual_projection'):
            return int(self.net.visual_projection.out_features)
        return int(self.net.config.hidden_size)

    def normalised(self, pixels: Tensor) -> Tensor:
        """[N, 3, S, S] in [0, 1] as the encoder takes it, in its dtype."""
        mean, std = (torch.tensor(v, dtype=pixels.dtype, device=pixels.device).view(-1, 1, 1)
                     for v in (self.preparation.mean, self.preparation.std))
        return ((pixels - mean) / std).to(self.net.dtype)

    @torch.no_grad()
    def embed(self, pixels: Tensor, hidden: bool) -> Tensor:
        """Normalised [N, 3, S, S] to embeddings [N, E], or to the hidden states [N, T, E] before the last layer.

        Raises:
            ValueError: this encoder does not give them.
        """
        output = self.net(pixel_values=pixels, output_hidden_states=hidden)
        if hidden:
            found = output.hidden_states[-2]
        else:
            found = output.get('image_embeds')
            found = output.get('pooler_output') if found is None else found
        if found is None or found.dim() != 2 + hidden:
            raise ValueError(f"The image encoder '{self.source}' ({type(self.net).__name__}) gives no "
                             + ('hidden states [N, T, E], so it serves no IP-Adapter plus.' if hidden else
                                "pooled embedding; take variant='plus', which reads its hidden states."))
        return found

    def null(self, hidden: bool, num_images: int = 1) -> Tensor:
        """What stands for no picture, [1, E] or [num_images, T, E]: a zero embedding, or hidden states of zero pixels.

        Zero after normalisation, so a gray image, as in diffusers. Computed once for each number of images, as the
        encoder is frozen; in one batch, as by diffusers' `encode_image`, since kernels depend on the batch size.
        """
        options: dict[str, Any] = {'dtype': self.net.dtype, 'device': self.net.device}
        if not hidden:
            return torch.zeros(1, self.width(False), **options)
        known = self._null.get(num_images)
        if known is None or (known.dtype, known.device) != (self.net.dtype, self.net.device):
            side = self.preparation.size
            known = self._null[num_images] = self.embed(torch.zeros(num_images, 3, side, side, **options), True)
        return known


def load_encoder(source: str, subfolder: str | None, dtype: torch.dtype) -> PictureEncoder:
    """An image encoder of transformers, strict, without a trace in the global random numbers.

    Args:
        source: folder, hub id, 'diffengine_sdxl::<folder>', or link to the weights or config of one on the hub.
        subfolder: of it.

    Raises:
        ValueError: it cannot be loaded, or its pictures cannot be prepared.
    """
    from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection
    source = str(shipped(source))
    source, revision, inner, variant = hub.linked_model(source) or (source, None, None, None)
    subfolder = subfolder or inner
    where = {'subfolder': subfolder} if subfolder else {}
    shown = f'{source}/{subfolder}' if subfolder else source
    path, settings = _fetched(source, subfolder, revision, variant)
    config = said(shown, AutoConfig.from_pretrained, path, **where)
    with rng.fork('image encoder'):
        cls = CLIPVisionModelWithProjection if config.model_type == 'clip_vision_model' else AutoModel
        net = load_pretrained(cls, path, dtype=dtype, shown=source, variant=variant, **where)
        if config.model_type == 'clip':
            both, net = net, CLIPVisionModelWithProjection(config.vision_config)
            net.vision_model, net.visual_projection = both.vision_model, both.visual_projection
            net.to(dtype)
        elif hasattr(net, 'vision_model') and hasattr(net, 'text_model'):  # SigLIP and its like
            net = net.vision_model
    size = getattr(net.config, 'image_size', None) or 224
    size = size if isinstance(size, int) else size[0]
    known = said(str(settings), lambda: json.loads(settings.read_text())) if settings else {}
    return PictureEncoder(net, Preparation.of(known, size, shown), shown)


def _fetched(source: str, subfolder: str | None, revision: str | None, variant: str | None) -> tuple[str, Path | None]:
    """The folder of an image encoder, and the settings of its pictures, if there are any.

    They lie beside the weights, or in a folder 'feature_extractor' beside theirs, or in one within theirs. Of a
    repository on the hub all these files are brought here.
    """
    inner = PurePosixPath(subfolder or '.')
    folders = dict.fromkeys((inner, inner.parent / 'feature_extractor'))
    names = [str(folder / 'preprocessor_config.json') for folder in folders]
    place = hub.here(source)
    if place is not None:
        found = [place / name for name in names]
        if not subfolder:
            found.append(place.resolve().parent / 'feature_extractor' / 'preprocessor_config.json')
        return str(place), next((path for path in found if path.is_file()), None)
    repo = hub.Repo(source, revision)
    own = [name for name in names if name in repo.names][:1]
    if repo.partial and not own:
        print_log(f"{repo} has no preprocessor_config.json for the image encoder; if the repository has one, it is not "
                  "followed. CLIP's preparation is taken.", logger='current', level=logging.WARNING)
    place = repo.fetch([*repo.model_files(subfolder, variant), *own])
    return str(place), place / own[0] if own else None
