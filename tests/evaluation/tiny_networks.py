"""Tiny networks of transformers with random weights, written to a folder as the hub has them."""

from pathlib import Path
from typing import Any

import transformers

from diffengine_sdxl import rng
from diffengine_sdxl.testing import tiny_tokenizer

VISION: dict[str, Any] = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=16)
PIXELS: dict[str, Any] = dict(size={'height': 32, 'width': 32}, crop_size={'height': 32, 'width': 32})


def write_clip(folder: Path, width: int = 12) -> Path:
    """Write a CLIP of image and text: two layers each, 32 pixels, 20 tokens."""
    text = dict(vocab_size=514, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=20, bos_token_id=512, eos_token_id=513, pad_token_id=513)
    with rng.fork('tiny clip', width):
        net = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION,
                                                             projection_dim=width))
    net.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    transformers.CLIPImageProcessorPil(size={'shortest_edge': 32}, crop_size=PIXELS['crop_size']
                                       ).save_pretrained(folder)
    return folder


def write_vision(folder: Path, kind: str) -> Path:
    """Write a network for images alone: 'dinov2', 'dino' (a ViT without pooling layer), 'vit', 'siglip', 'convnext'."""
    with rng.fork('tiny', kind):
        if kind == 'convnext':
            net: Any = transformers.ConvNextModel(transformers.ConvNextConfig(
                hidden_sizes=[8, 8, 8, 24], depths=[1, 1, 1, 1], image_size=32))
        elif kind == 'dinov2':
            net = transformers.Dinov2Model(transformers.Dinov2Config(**VISION, mlp_ratio=2))
        elif kind == 'siglip':
            net = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))
        else:
            net = transformers.ViTModel(transformers.ViTConfig(**VISION), add_pooling_layer=kind == 'vit')
    net.save_pretrained(folder)
    processor = {'convnext': 'ConvNext', 'dinov2': 'Bit', 'siglip': 'Siglip'}.get(kind, 'ViT')
    sizes = {'size': {'shortest_edge': 32}} if kind == 'convnext' else PIXELS
    getattr(transformers, f'{processor}ImageProcessorPil')(**sizes).save_pretrained(folder)
    return folder
