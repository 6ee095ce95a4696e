"""What kohya's sd-scripts, LyCORIS and ComfyUI call the layers of an SDXL, computed from the live model's own names.

The UNet has two sets of names in use: those of the layout that Stability published SDXL in (`input_blocks`,
`middle_block`, `output_blocks`; sd-scripts writes these) and diffusers'. In both, dots become underscores, which cannot
be undone from the file's side: so a table is made from the model's side.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

#: Part of an SDXL -> what the names of its layers begin with in a file.
PREFIXES = {'unet': 'lora_unet_', 'text_encoder': 'lora_te1_', 'text_encoder_2': 'lora_te2_'}

_OUTSIDE = {'conv_in': 'input_blocks.0.0', 'conv_out': 'out.2', 'time_embedding.linear_1': 'time_embed.0',
            'time_embedding.linear_2': 'time_embed.2', 'add_embedding.linear_1': 'label_emb.0.0',
            'add_embedding.linear_2': 'label_emb.0.2'}
#: Kind of a block's member -> diffusers' name of a layer in it -> the original's; the others are called the same.
_INSIDE: dict[str, dict[str, str]] = {
    'resnets': {'conv1': 'in_layers.2', 'conv2': 'out_layers.3', 'time_emb_proj': 'emb_layers.1',
                'conv_shortcut': 'skip_connection'}, 'downsamplers': {'conv': 'op'}}
_MEMBER = re.compile(r'((?:down|up)_blocks\.\d+|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.')

Modules = Mapping[str, Mapping[str, nn.Module]]


def file_names(modules: Modules) -> dict[str, dict[str, tuple[str, ...]]]:
    """part -> full name of a linear or convolutional layer in memory -> its names in files.

    The first name is the one to write: for the UNet the original's (where it has such a layer), which sd-scripts,
    A1111, ComfyUI and diffusers all read.

    Args:
        modules: part -> full name -> module of the live base, without wrappers.
    """
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for part, prefix in PREFIXES.items():
        layers = [n for n, m in modules.get(part, {}).items() if isinstance(m, nn.Linear | nn.Conv2d)]
        names = _unet_names(layers) if part == 'unet' else {n: (_text_name(n),) for n in layers}
        found[part] = {n: tuple(prefix + f.replace('.', '_') for f in files) for n, files in names.items()}
    taken = Counter(f for names in found.values() for files in names.values() for f in files)
    assert max(taken.values(), default=1) == 1, [f for f, count in taken.items() if count > 1]
    return found


def _text_name(name: str) -> str:
    """In files always as transformers 4 named both encoders, whatever the one at hand does."""
    return name if name.startswith(('text_model.', 'text_projection')) else f'text_model.{name}'


def _unet_names(layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    layers = list(layers)
    places = dict(_places(layers))
    names: dict[str, tuple[str, ...]] = {}
    for name in layers:
        original = _OUTSIDE.get(name)
        if (match := _MEMBER.match(name)) and match[0][:-1] in places:
            rest = name[match.end():]
            original = f'{places[match[0][:-1]]}.{_INSIDE.get(match[2], {}).get(rest, rest)}'
        names[name] = (name,) if original is None else (original, name)
    return names


def _places(layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """'down_blocks.1.attentions.0' -> 'input_blocks.4.1' and so on.

    The original numbers the layers of all levels through. A layer holds a resnet (0) and perhaps a transformer (1). A
    downsampler is a layer of its own; an upsampler is the last member of its level's last layer. `conv_in` is layer 0
    of the input.
    """
    counts: dict[str, Counter[str]] = {}
    for member in dict.fromkeys(m.group(1, 2, 3) for name in layers if (m := _MEMBER.match(name))):
        counts.setdefault(member[0], Counter())[member[1]] += 1
    for side, target, number in (('down_blocks', 'input_blocks', 1), ('up_blocks', 'output_blocks', 0)):
        blocks = (b for b in counts if b.startswith(side))
        for block in sorted(blocks, key=lambda b: int(b.rpartition('.')[2])):
            for layer in range(counts[block]['resnets']):
                yield f'{block}.resnets.{layer}', f'{target}.{number}.0'
                yield f'{block}.attentions.{layer}', f'{target}.{number}.1'
                number += 1
            if counts[block]['downsamplers']:
                yield f'{block}.downsamplers.0', f'{target}.{number}.0'
                number += 1
            yield f'{block}.upsamplers.0', f'{target}.{number - 1}.{2 if counts[block]["attentions"] else 1}'
    for layer in range(counts.get('mid_block', Counter())['resnets']):
        yield f'mid_block.resnets.{layer}', f'middle_block.{2 * layer}'
        yield f'mid_block.attentions.{layer}', f'middle_block.{2 * layer + 1}'
