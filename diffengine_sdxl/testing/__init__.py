"""Tiny models, data and stand-ins to try and test things without network: `python -m diffengine_sdxl.testing`."""

from .circles import COLOURS, draw_circle, write_circles
from .models import (
    REFINER_BLOCKS,
    byte_characters,
    sdxl_scheduler,
    tiny_image_encoder,
    tiny_text_encoders,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
    write_tiny_image_encoder,
    write_tiny_refiner,
    write_tiny_sdxl,
)

__all__ = ['COLOURS', 'REFINER_BLOCKS', 'byte_characters', 'draw_circle', 'sdxl_scheduler', 'tiny_image_encoder',
           'tiny_text_encoders', 'tiny_tokenizer', 'tiny_unet', 'tiny_vae', 'write_circles', 'write_tiny_image_encoder',
           'write_tiny_refiner', 'write_tiny_sdxl']
