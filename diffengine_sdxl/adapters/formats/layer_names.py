"""Names of SDXL's layers in files of kohya's sd-scripts, LyCORIS and ComfyUI, computed from the live model's names.

The UNet has two sets of names: those of Stability's original layout (`input_blocks`, `middle_block`, `output_blocks`;
sd-scripts writes these) and diffusers'. In kohya's files dots become underscores, which is not invertible: so the table
is built from the model's names. ComfyUI's own files keep the dots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from diffengine_sdxl.loading.unet_keys import original_names

#: Part of an SDXL -> prefix of its layers' names in a file.
PREFIXES = {'unet': 'lora_unet_', 'text_encoder': 'lora_te1_', 'text_encoder_2': 'lora_te2_'}
#: What SD 1.x's only text encoder is called; diffusers and ComfyUI read it as SDXL's first.
ONLY_ENCODER = 'lora_te_'
#: Part -> prefixes of names that keep their dots; ComfyUI's and OneTrainer's, and those of diffusers and peft.
_DOTTED = {'unet': ('unet.', 'unet.base_model.model.', 'base_model.model.', ''),
           'text_encoder': ('text_encoders.clip_l.transformer.', 'clip_l.', 'text_encoder.',
                            'text_encoder.base_model.model.'),
           'text_encoder_2': ('text_encoders.clip_g.transformer.', 'clip_g.', 'text_encoder_2.',
                              'text_encoder_2.base_model.model.')}
_DOTTED_ORIGINAL = ('diffusion_model.', 'model.diffusion_model.', '')

Modules = Mapping[str, Mapping[str, nn.Module]]


def file_names(modules: Modules) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return part -> full name of a linear or convolutional layer in memory -> its names in kohya's files.

    The first name is the one to write: for the UNet the original name (if there is one), which sd-scripts, A1111,
    ComfyUI and diffusers all read.

    Args:
        modules: part -> full name -> module of the live base, without wrappers.
    """
    table = {part: kohya_names(part, [name for name, module in modules.get(part, {}).items()
                                      if isinstance(module, nn.Linear | nn.Conv2d)]) for part in PREFIXES}
    counts = Counter(f for names in table.values() for files in names.values() for f in files)
    assert max(counts.values(), default=1) == 1, [f for f, count in counts.items() if count > 1]
    return table


def kohya_names(part: str, layers: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return layer -> its names in kohya's files, of a part's layers (of a UNet: one of each member of each block)."""
    originals = original_names(layers) if part == 'unet' else {n: _text_name(n) for n in layers}
    return {n: tuple(PREFIXES[part] + f.replace('.', '_') for f in dict.fromkeys((originals.get(n, n), *(
        (n,) if part == 'unet' else ())))) for n in layers}


def spellings(modules: Modules) -> dict[str, tuple[str, str]]:
    """Return every name that files have for a layer -> (part, full name in memory).

    Args:
        modules: see `file_names`; layers of all kinds.
    """
    return {spelling: (part, name) for part, layers in modules.items() for name, names in _spellings(part, layers)
            for spelling in names}


def _spellings(part: str, layers: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each layer with its names."""
    originals = original_names(layers) if part == 'unet' else {}
    for name, files in kohya_names(part, layers).items():
        if part == 'unet':
            names = [f'lycoris_{name.replace(".", "_")}', *(f'{prefix}{name}' for prefix in _DOTTED[part])]
            if name in originals:
                names += [f'{prefix}{originals[name]}' for prefix in _DOTTED_ORIGINAL]
        else:
            bodies = dict.fromkeys((name, name.removeprefix('text_model.'), _text_name(name)))
            names = [f'{prefix}{body}' for prefix in _DOTTED[part] for body in bodies]
            if part == 'text_encoder':
                names += [file.replace(PREFIXES[part], ONLY_ENCODER) for file in files]
        yield name, [*files, *names]


def _text_name(name: str) -> str:
    """Return the name as in transformers 4, which files use for both encoders."""
    return name if name.startswith(('text_model.', 'text_projection')) else f'text_model.{name}'
