"""A CLIP image encoder that learns to match captions; an IP-Adapter can read images through it later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffengine_sdxl.adapters.base import Adapter
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading.strict import load_pretrained, shipped
from diffengine_sdxl.protocols import AdapterHost
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.structures import Batch, send

#: Of CLIP's image processor (Radford et al. 2021).
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@ADAPTERS.register_module()
class ImageEncoder(Adapter):
    """transformers' CLIPVisionModelWithProjection. It adds nothing to the UNet; `ImageTextContrast` trains it.

    Args:
        weights: folder, hub id or link to the hub; None for fresh weights.
        subfolder, revision: of `weights`.
        trainable: see Adapter.
        image_size, patch_size, hidden_size, num_hidden_layers, num_attention_heads: of fresh weights.

    Raises:
        UserError: in `attach`, if `weights` are not a CLIP image encoder or project to another width than the base's
            second text encoder.
    """

    brings_precision = True

    def __init__(self, weights: str | None = None, subfolder: str | None = None, trainable: bool = True,
                 image_size: int = 224, patch_size: int = 14, hidden_size: int = 768, num_hidden_layers: int = 12,
                 num_attention_heads: int = 12, revision: str | None = None) -> None:
        super().__init__(None, weights, trainable)
        self.source: dict[str, Any] = {'subfolder': subfolder, 'revision': revision}
        self.shape = {'image_size': image_size, 'patch_size': patch_size, 'hidden_size': hidden_size,
                      'num_hidden_layers': num_hidden_layers, 'num_attention_heads': num_attention_heads,
                      'intermediate_size': 4 * hidden_size}

    def attach(self, model: AdapterHost) -> None:
        """Build the encoder; fresh weights depend on (seed, adapter name) alone."""
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
        width = model.text_encoder_2.config.projection_dim
        if self.weights is not None:
            self.net = load_pretrained(CLIPVisionModelWithProjection, str(shipped(self.weights)), **self.source)
        else:
            self.net = CLIPVisionModelWithProjection(CLIPVisionConfig(**self.shape, projection_dim=width))
        if self.net.config.projection_dim != width:
            raise UserError(f"'{self.weights}' projects images to {self.net.config.projection_dim} numbers; the "
                            f"base's text_encoder_2 has {width}. Use the encoder that was trained with it.")

    def detach(self, model: AdapterHost) -> None:
        """Drop the encoder, which is all there is."""
        del self.net

    def embed(self, batch: Batch) -> Tensor:
        """Return the images' embeddings [B, P], P the width of the base's pooled text.

        Source: transformers' CLIPImageProcessor (shorter side resized, center crop), in floats.

        Raises:
            UserError: the batch has no image.
        """
        if batch.img is None:
            raise UserError("The samples hold no 'img'; an image encoder cannot learn from cached latents.")
        size = self.net.config.image_size
        pixels = batch.img.to(torch.promote_types(self.net.dtype, torch.float32)) * 0.5 + 0.5
        short = min(pixels.shape[-2:])
        if short != size:
            scaled = [size * side // short for side in pixels.shape[-2:]]
            pixels = functional.interpolate(pixels, scaled, mode='bicubic', antialias=True).clamp(0, 1)
        top, left = ((side - size) // 2 for side in pixels.shape[-2:])
        pixels = pixels[..., top:top + size, left:left + size]
        mean, std = (send(torch.tensor(v, dtype=pixels.dtype), pixels.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        embeds: Tensor = self.net(((pixels - mean) / std).to(self.net.dtype)).image_embeds
        return embeds

    def add_to_pipeline(self, stock: Any) -> None:
        """Nothing: it takes no part in sampling."""

    def save(self, folder: str | Path) -> None:
        """Write transformers' folder, with the settings of the image processor that prepares its input."""
        from transformers import CLIPImageProcessorPil
        size = self.net.config.image_size
        self.net.save_pretrained(str(folder))
        CLIPImageProcessorPil(size={'shortest_edge': size}, crop_size={'height': size, 'width': size}, image_mean=MEAN,
                              image_std=STD).save_pretrained(str(folder))

    def load(self, source: str | Path) -> None:
        """Read transformers' folder, in place.

        Raises:
            UserError: a key is missing or unknown, or the widths differ.
        """
        loaded = load_pretrained(type(self.net), str(source))
        theirs, ours = loaded.config.to_dict(), self.net.config.to_dict()
        self._check_same(source, theirs, {k: ours[k] for k in (*self.shape, 'projection_dim')})
        self.net.load_state_dict(loaded.state_dict())
