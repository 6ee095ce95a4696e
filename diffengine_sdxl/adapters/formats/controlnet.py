"""ControlNets: what a folder's config says of one, and single files under diffusers' names or the original ones.

The original layout is lllyasviel/ControlNet's (cldm/cldm.py), perhaps below `control_model.`: the UNet's encoder under
the UNet's original names, the control image's embedding `input_hint_block.<2 n>`, and the outputs `zero_convs.<n>.0`
and `middle_block_out.0`. A Control-LoRA (stabilityai/control-lora) has these names and the mark `lora_controlnet`; it
holds most weights as the factors of their difference from the base's, `<module>.up` @ `<module>.down`, and the others
as they are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.adapters.formats import files
from diffengine_sdxl.config.signatures import accepted, fits
from diffengine_sdxl.errors import UserError, listed
from diffengine_sdxl.limits import CURRENT
from diffengine_sdxl.loading.files import WEIGHTS, read_json
from diffengine_sdxl.loading.unet_keys import original_names

CONFIG = 'config.json'
#: A key of each layout, and of a union.
HINT, EMBEDDING, UNION = 'input_hint_block.0.weight', 'controlnet_cond_embedding.conv_in.weight', 'task_embedding'
CONTROL_LORA = 'lora_controlnet'
#: `_class_name` of a config.json; the last one is of early unions.
CLASSES = ('ControlNetModel', 'ControlNetUnionModel', 'ControlNetModel_Union')
#: diffusers' names of modules whose original names `original_names` knows: outside the blocks, and in a residual block.
_TOP_LEVEL = ('conv_in', *(f'{part}_embedding.linear_{i}' for part in ('time', 'add') for i in (1, 2)))
_IN_RESNET = ('norm1', 'conv1', 'time_emb_proj', 'norm2', 'conv2', 'conv_shortcut')
#: Settings that count layers or kinds of them.
_COUNTS = ('layers_per_block', 'transformer_layers_per_block', 'num_trans_layer', 'num_control_type')
#: Settings that are numbers above 0, or a list of them for the blocks.
_SIZES = (*_COUNTS, 'in_channels', 'conditioning_channels', 'block_out_channels', 'norm_num_groups',
          'cross_attention_dim', 'attention_head_dim', 'num_attention_heads', 'addition_time_embed_dim',
          'projection_class_embeddings_input_dim', 'conditioning_embedding_out_channels', 'num_trans_channel',
          'num_trans_head', 'num_proj_channel')

State = dict[str, Tensor]


def is_controlnet(tensors: Mapping[Any, Any]) -> bool:
    """Return whether a file with these tensors holds a ControlNet."""
    return any(str(key).endswith((HINT, EMBEDDING)) for key in unnested(tensors))


def unnested(tensors: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return the tensors of a file, also where a trainer's pickle has them one level deeper."""
    while isinstance(tensors.get('state_dict'), Mapping):
        tensors = tensors['state_dict']
    return tensors


def network_class(is_union: bool) -> Any:
    """Return diffusers' class of a ControlNet, or of one of several control types."""
    from diffusers import ControlNetModel, ControlNetUnionModel
    return ControlNetUnionModel if is_union else ControlNetModel


def locate(source: str | Path, subfolder: str | None, revision: str | None
           ) -> tuple[Path | None, dict[str, Any] | None]:
    """Return the single file that `source` names, None for a folder of diffusers, and the config.json beside it.

    A folder without a config.json stands for the only weight file in it; shards stand for their folder.

    Raises:
        UserError: there is no such source, or the config cannot be read.
    """
    folder, name = files.locate(source, subfolder, None, revision)
    config = read_json(folder.file(CONFIG)) if folder.has(CONFIG) else None
    sharded = name is not None and WEIGHTS.fullmatch(name) is not None and '-of-' in name
    if config is not None and (name is None or name.endswith('.json') or sharded):
        return None, config
    return (folder.file(name) if name else files.find(source, (), subfolder, revision=revision)), config


def full_config(source: str | Path, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the class that a config.json is of, and its settings with the class's defaults; lists as tuples.

    Raises:
        UserError: it is of another class, or a value is of no network that could be built.
    """
    name = str(config.get('_class_name', CLASSES[0]))
    if name not in CLASSES:
        raise UserError(f"'{source}' is a model of class {name}, not a ControlNet.")
    cls = network_class('Union' in name)
    settings = {**_defaults(cls), **{k: v for k, v in config.items() if k in _defaults(cls)}}
    settings = _with_tuples(settings)
    hints = accepted(cls) or {}
    if wrong := [key for key, value in settings.items() if not fits(value, hints[key].annotation)]:
        raise UserError(f"The {CONFIG} of '{source}' has {wrong[0]}={settings[wrong[0]]!r}, which is no value of that "
                        'setting; it is damaged.')
    for key in _SIZES:
        values = settings[key] if isinstance(settings.get(key), tuple) else (settings.get(key),)
        most = CURRENT.network_layers if key in _COUNTS else 2**20
        for value in values:
            if value is not None and (type(value) is not int or not 0 < value <= most):
                raise UserError(f"The {CONFIG} of '{source}' has {key}={settings[key]!r}; it must hold whole numbers "
                                f'from 1 to {most}' + (' (limits.network_layers).' if key in _COUNTS else '.'))
    return cls, settings


def read_controlnet(path: Path, config: Mapping[str, Any] | None, unet: Any, unet_state: Mapping[str, Tensor],
                    ignore_keys: Sequence[str] = ()) -> tuple[Any, dict[str, Any], State]:
    """Read a single file; what its tensors don't show comes from the config beside it, or else from the base.

    Args:
        path: the file.
        config: the config.json beside it, if there is one.
        unet: config of the base's UNet. unet_state: its weights, to which a Control-LoRA adds.
        ignore_keys: see `files.read`.

    Returns:
        diffusers' class, its settings, and the weights under diffusers' names in the file's dtype.

    Raises:
        UserError: it cannot be read, or holds no ControlNet.
    """
    tensors = unnested(files.read(path, ignore_keys=ignore_keys).tensors)
    prefix = next((key.removesuffix(mark) for key in map(str, tensors) for mark in (HINT, EMBEDDING)
                   if key.endswith(mark)), None)
    if prefix is None:
        raise UserError(f"'{path}' holds no ControlNet: it has neither {HINT} nor {EMBEDDING}.")
    files.refuse(path, unknown=[str(k) for k, value in tensors.items()
                                if not isinstance(value, Tensor) or not str(k).startswith(prefix)])
    state = {key.removeprefix(prefix): value for key, value in tensors.items()}
    is_lora = state.pop(CONTROL_LORA, None) is not None
    if HINT in state:
        state = _renamed(state)
    if is_lora:
        state = _merged(path, state, unet_state)
    cls = network_class(UNION in state)
    base = {key: unet[key] for key in _defaults(cls) if key in unet and not key.startswith(('encoder_hid', 'class_'))}
    # A folder of files of many kinds may hold the config of another one.
    beside = full_config(path, config)[1] if config and config.get('_class_name') in CLASSES else {}
    settings = {**_defaults(cls), **base, **{k: v for k, v in beside.items() if k in _defaults(cls)}}
    return cls, _with_tuples(settings | _shown(path, state, settings)), state


def _with_tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def _defaults(cls: Any) -> dict[str, Any]:
    return {key: p.default for key, p in inspect.signature(cls.__init__).parameters.items() if key != 'self'}


def _renamed(state: Mapping[str, Tensor]) -> State:
    """Return original names as diffusers'; others, such as those of a union, stay."""
    modules = [*_TOP_LEVEL]
    for member, original in _members(state):
        if 'resnets' in member:
            modules += [f'{member}.{name}' for name in _IN_RESNET]
        else:
            modules += [f'{member}.conv'] if 'downsamplers' in member else dict.fromkeys(
                f'{member}{key.removeprefix(original).rpartition(".")[0]}' for key in state
                if key.startswith(f'{original}.'))
    names = {original: name for name, original in original_names(modules).items()}
    last = max(int(match[1]) for key in state if (match := re.match(r'input_hint_block\.(\d+)\.', key)))

    def renamed(module: str) -> str:
        if match := re.fullmatch(r'input_hint_block\.(\d+)', module):
            number = int(match[1])
            return 'controlnet_cond_embedding.' + ('conv_in' if number == 0 else 'conv_out' if number == last else
                                                   f'blocks.{number // 2 - 1}')
        if match := re.fullmatch(r'zero_convs\.(\d+)\.0', module):
            return f'controlnet_down_blocks.{match[1]}'
        return 'controlnet_mid_block' if module == 'middle_block_out.0' else names.get(module, module)
    return {f'{renamed(module)}.{leaf}' if module else leaf: value for key, value in state.items()
            for module, _, leaf in [key.rpartition('.')]}


def _members(keys: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield diffusers' and the original name of every residual block, transformer and downsampler of an encoder."""
    found = {match[0] for key in keys if (match := re.match(r'(input_blocks\.\d+|middle_block)\.\d+', key))}
    downsamplers = {key.rpartition('.op.')[0] for key in keys if '.op.' in key}
    block = layer = 0
    for number in range(1, len(found)):  # there are no more layers than members
        first, second = f'input_blocks.{number}.0', f'input_blocks.{number}.1'
        if first in downsamplers:
            yield f'down_blocks.{block}.downsamplers.0', first
            block, layer = block + 1, 0
        elif first in found:
            yield f'down_blocks.{block}.resnets.{layer}', first
            if second in found:
                yield f'down_blocks.{block}.attentions.{layer}', second
            layer += 1
    for number in range(3):
        if (name := f'middle_block.{number}') in found:
            yield f'mid_block.{"attentions" if number == 1 else "resnets"}.{number // 2}', name


def _merged(path: Path, state: Mapping[str, Tensor], unet_state: Mapping[str, Tensor]) -> State:
    """Return the whole ControlNet of a Control-LoRA: the base's encoder, plus up @ down, or as the file has it."""
    merged = {key: value.detach().cpu() for key, value in unet_state.items()
              if key.startswith(('conv_in.', 'time_embedding.', 'add_embedding.', 'down_blocks.', 'mid_block.'))}
    factors: dict[str, State] = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition('.')
        if leaf in ('up', 'down'):
            factors.setdefault(module, {})[leaf] = value
        else:
            merged[key] = value
    lone = [f'{module}.{leaf}' for module, pair in factors.items() for leaf in ('up', 'down') if leaf not in pair]
    files.refuse(path, missing=lone, unknown=[m for m in factors if f'{m}.weight' not in merged])
    if empty := [f'{module}.{leaf}' for module, pair in factors.items() for leaf in pair if not pair[leaf].numel()]:
        raise UserError(f"'{path}' holds layers of rank 0 ({listed(empty)}), so it is no Control-LoRA.")
    for module, pair in factors.items():
        weight = merged[f'{module}.weight']
        dtype = torch.promote_types(weight.dtype, torch.float32)
        up, down = (pair[leaf].to(dtype).reshape(len(pair[leaf]) if pair[leaf].dim() else 1, -1)
                    for leaf in ('up', 'down'))
        if up.shape[1] != len(down) or (len(up), down.shape[1]) != tuple(weight.flatten(1).shape):
            raise UserError(f"'{path}' changes {module} by {tuple(pair['up'].shape)} @ {tuple(pair['down'].shape)}; "
                            f"the base's weight is {tuple(weight.shape)}. It was made for another base.")
        merged[f'{module}.weight'] = weight.to(dtype) + (up @ down).view(weight.shape)
    return merged


def _shown(path: Path, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a ControlNet's tensors show; `settings` are those to keep where they show none."""
    def size(key: str, dim: int = 0) -> int:
        files.refuse(path, missing=[key] if key not in state else [],
                     of_another_shape=[key] if key in state and state[key].dim() <= dim else [])
        return state[key].shape[dim]

    def count(prefix: str) -> int:
        return len({key[len(prefix):].partition('.')[0] for key in state if key.startswith(prefix)})

    def first(suffix: str) -> str | None:
        return next((key for key in state if key.endswith(suffix)), None)

    num = count('down_blocks.')
    depths = [count(f'down_blocks.{i}.attentions.0.transformer_blocks.') for i in range(num)]
    middle = count('mid_block.attentions.0.transformer_blocks.')
    given = settings['transformer_layers_per_block']
    given = [given] * num if isinstance(given, int) else [*given, *[1] * num]
    has_text_time = 'add_embedding.linear_1.weight' in state
    shown: dict[str, Any] = {
        'in_channels': size('conv_in.weight', 1), 'conditioning_channels': size(EMBEDDING, 1),
        'layers_per_block': count('down_blocks.0.resnets.'),
        'block_out_channels': tuple(size(f'down_blocks.{i}.resnets.0.conv2.weight') for i in range(num)),
        'down_block_types': tuple('CrossAttnDownBlock2D' if depth else 'DownBlock2D' for depth in depths),
        'transformer_layers_per_block': tuple((middle if i == num - 1 else 0) or depths[i] or given[i]
                                              for i in range(num)),
        'addition_embed_type': 'text_time' if has_text_time else None,
        'projection_class_embeddings_input_dim': size('add_embedding.linear_1.weight', 1) if has_text_time else None,
        'conditioning_embedding_out_channels': (size(EMBEDDING), *(
            size(f'controlnet_cond_embedding.blocks.{i}.weight')
            for i in range(1, count('controlnet_cond_embedding.blocks.'), 2)))}
    if key := first('attn2.to_k.weight'):
        shown['cross_attention_dim'] = size(key, 1)
    if key := first('proj_in.weight'):
        shown['use_linear_projection'] = state[key].dim() == 2
    if UNION not in state:
        return shown | {'mid_block_type': 'UNetMidBlock2DCrossAttn' if middle else 'UNetMidBlock2D'}
    return shown | {'num_control_type': size(UNION), 'num_trans_channel': size(UNION, 1),
                    'num_trans_layer': count('transformer_layes.'), 'num_proj_channel': size('spatial_ch_projs.weight'),
                    'addition_time_embed_dim': size('control_add_embedding.linear_1.weight', 1) // max(1, size(UNION))}
