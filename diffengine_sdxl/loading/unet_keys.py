"""The original names of an SDXL UNet's modules, computed from diffusers' names.

The original layout (`input_blocks`, `middle_block`, `output_blocks`) is used by Stability's single files, sd-scripts
and ComfyUI.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator

#: Modules outside the blocks: diffusers' name -> the original's.
_TOP_LEVEL = {'conv_in': 'input_blocks.0.0', 'time_embedding.linear_1': 'time_embed.0',
              'time_embedding.linear_2': 'time_embed.2', 'add_embedding.linear_1': 'label_emb.0.0',
              'add_embedding.linear_2': 'label_emb.0.2', 'conv_norm_out': 'out.0', 'conv_out': 'out.2'}
#: Kind of a block's member -> diffusers' name of a module in it -> the original's; others have the same name in both.
_IN_MEMBER: dict[str, dict[str, str]] = {
    'resnets': {'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'time_emb_proj': 'emb_layers.1',
                'norm2': 'out_layers.0', 'conv2': 'out_layers.3', 'conv_shortcut': 'skip_connection'},
    'downsamplers': {'conv': 'op'}}
_MEMBER = re.compile(r'((?:down|up)_blocks\.\d+|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.')


def original_names(modules: Collection[str]) -> dict[str, str]:
    """Return the original name of each module of a UNet that has one.

    Args:
        modules: diffusers' names of the UNet's modules, at least one of each member of each block.
    """
    members = dict(_members(modules))
    names = {name: _TOP_LEVEL[name] for name in modules if name in _TOP_LEVEL}
    for name in modules:
        if (match := _MEMBER.match(name)) and match[0][:-1] in members:
            inner = name[match.end():]
            names[name] = f'{members[match[0][:-1]]}.{_IN_MEMBER.get(match[2], {}).get(inner, inner)}'
    return names


def _members(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs such as ('down_blocks.1.attentions.0', 'input_blocks.4.1').

    The original numbers the layers of all levels consecutively. A layer holds a resnet (0) and perhaps a transformer
    (1). A downsampler is a layer of its own; an upsampler is the last member of its level's last layer. `conv_in` is
    layer 0 of the input.
    """
    counts: dict[str, Counter[str]] = {}
    for member in dict.fromkeys(m.group(1, 2, 3) for name in modules if (m := _MEMBER.match(name))):
        counts.setdefault(member[0], Counter())[member[1]] += 1
    for side, target, number in (('down_blocks', 'input_blocks', 1), ('up_blocks', 'output_blocks', 0)):
        blocks = (block for block in counts if block.startswith(side))
        for block in sorted(blocks, key=lambda name: int(name.rpartition('.')[2])):
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
