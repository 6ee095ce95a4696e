"""The writer of single files, and a base whose two text encoders differ."""

from pathlib import Path

from diffengine_sdxl import rng, testing
from diffengine_sdxl.testing.single_file import original_tensors, unet_tensors, write

__all__ = ['original_tensors', 'unet_tensors', 'write', 'write_tiny_with_two_widths']


def write_tiny_with_two_widths(folder: Path) -> Path:
    """A tiny SDXL whose encoders differ in width, 32 and 48, and whose levels have two layers, as SDXL's.

    diffusers tells the encoders of a single file apart by their width alone.
    """
    testing.write_tiny_sdxl(folder, layers_per_block=2, cross_attention_dim=80)
    with rng.fork(1, 'wider encoder'):
        testing.tiny_text_encoders(hidden=48)[1].save_pretrained(folder / 'text_encoder_2')
    return folder
