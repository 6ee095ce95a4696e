"""Names of SDXL's layers in files of kohya's sd-scripts, LyCORIS and ComfyUI, computed from the live model's names.

The UNet has two sets of names: those of Stability's original layout (`input_blocks`, `middle_block`, `output_blocks`;
sd-scripts writes these) and diffusers'. In both, dots become underscores, which is not invertible: so the table is
built from the model's names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from diffengine_sdxl.loading.unet_keys import original_names

#: Part of an SDXL -> prefix of its layers' names in a file.
PREFIXES = {'unet': 'lora_unet_', 'text_encoder': 'lora_te1_', 'text_encoder_2': 'lora_te2_'}

Modules = Mapping[str, Mapping[str, nn.Module]]


def file_names(modules: Modules) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return part -> full name of a linear or convolutional layer in memory -> its names in files.

    The first name is the one to write: for the UNet the original name (if there is one), which sd-scripts, A1111,
    ComfyUI and diffusers all read.

    Args:
        modules: part -> full name -> module of the live base, without wrappers.
    """
    table: dict[str, dict[str, tuple[str, ...]]] = {}
    names: dict[str, tuple[str, ...]]
    for part, prefix in PREFIXES.items():
        layers = [n for n, m in modules.get(part, {}).items() if isinstance(m, nn.Linear | nn.Conv2d)]
        if part == 'unet':
            originals = original_names(layers)
            names = {n: (originals[n], n) if n in originals else (n,) for n in layers}
        else:
            names = {n: (_text_name(n),) for n in layers}
        table[part] = {n: tuple(prefix + f.replace('.', '_') for f in files) for n, files in names.items()}
    counts = Counter(f for names in table.values() for files in names.values() for f in files)
    assert max(counts.values(), default=1) == 1, [f for f, count in counts.items() if count > 1]
    return table


def _text_name(name: str) -> str:
    """Return the name as in transformers 4, which files use for both encoders."""
    return name if name.startswith(('text_model.', 'text_projection')) else f'text_model.{name}'
