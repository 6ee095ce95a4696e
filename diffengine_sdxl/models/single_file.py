"""A whole SDXL in one `.safetensors` or `.ckpt` file, in the layout that Stability published it in.

diffusers' `from_single_file` reads such files too, and the tests compare with it. It is not called here, because it
cannot be checked from outside: tensors that it has no rule for are left out without a word, those that the file lacks
stay on the meta device, an encoder that is as wide as the other one gets the other one's weights, and one dtype goes
for all. Checking it takes the full map of names, and with the map in hand each tensor can be put in its place.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from diffengine_sdxl import hub

SDXL_FILES = Path(__file__).parent / 'sdxl_files'
#: What the refiner has of its own; its other parts are those of SDXL_FILES.
REFINER_FILES = Path(__file__).parent / 'refiner_files'
COMPONENTS = ('unet', 'vae', 'text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2', 'scheduler')
SUFFIXES = ('.safetensors', '.ckpt', '.pt', '.bin')

UNET, VAE = 'model.diffusion_model.', 'first_stage_model.'
EMBEDDER = 'conditioner.embedders.{}.'
# Of a UNet or VAE: its prefix in a whole model, a key of its own, what diffusers' names begin with, and all its keys.
_ALONE = {'unet': (UNET, 'input_blocks.0.0.weight', 'down_blocks.', ('',)),
          'vae': (VAE, 'encoder.conv_in.weight', 'encoder.down_blocks.', ('encoder.', 'decoder.'))}
_SHOWN = {'unet': 'UNet', 'vae': 'VAE'}

Names = Mapping[str, str]
_UNET_TOP: Names = {
    'conv_in': 'input_blocks.0.0', 'time_embedding.linear_1': 'time_embed.0', 'time_embedding.linear_2': 'time_embed.2',
    'add_embedding.linear_1': 'label_emb.0.0', 'add_embedding.linear_2': 'label_emb.0.2',
    'conv_norm_out': 'out.0', 'conv_out': 'out.2', 'mid_block.resnets.0': 'middle_block.0',
    'mid_block.attentions.0': 'middle_block.1', 'mid_block.resnets.1': 'middle_block.2'}
_UNET_RESNET: Names = {
    'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'time_emb_proj': 'emb_layers.1', 'norm2': 'out_layers.0',
    'conv2': 'out_layers.3', 'conv_shortcut': 'skip_connection'}
_VAE: Names = {
    'mid_block.resnets.0': 'mid.block_1', 'mid_block.resnets.1': 'mid.block_2', 'mid_block.attentions.0': 'mid.attn_1',
    'conv_norm_out': 'norm_out', 'conv_shortcut': 'nin_shortcut', 'group_norm': 'norm', 'to_q': 'q', 'to_k': 'k',
    'to_v': 'v', 'to_out.0': 'proj_out', 'downsamplers.0': 'downsample', 'upsamplers.0': 'upsample'}
_OPEN_CLIP: Names = {
    'embeddings.token_embedding': 'token_embedding', 'embeddings.position_embedding.weight': 'positional_embedding',
    'final_layer_norm': 'ln_final', 'encoder.layers': 'transformer.resblocks', 'layer_norm1': 'ln_1',
    'layer_norm2': 'ln_2', 'mlp.fc1': 'mlp.c_fc', 'mlp.fc2': 'mlp.c_proj', 'self_attn.out_proj': 'attn.out_proj'}
# Numbers that the models compute by themselves, and open_clip's contrastive temperature.
_NOT_WEIGHTS = re.compile(r'(\.position_ids|\.logit_scale|\.attn_mask)$')


class Origin(NamedTuple):
    """Where a parameter lies in the file: its key there, which third of it, and whether it lies transposed."""

    key: str
    third: int | None = None
    transposed: bool = False

    def fit(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """The view of the file's tensor that is this parameter; `shape` is the parameter's."""
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        if self.transposed:
            tensor = tensor.t()
        # The VAE's attention was made of 1x1 convolutions and is of linear layers in diffusers.
        return tensor.flatten(1) if tensor.dim() == 4 and tensor.shape[2:] == (1, 1) and len(shape) == 2 else tensor


def is_single_file(source: str | Path) -> bool:
    """Whether `source` names a single file (path, link or `org/repo/file.safetensors`), not a folder or a hub id."""
    return str(source).split('?')[0].endswith(SUFFIXES) and not os.path.isdir(source)


def load_single_file(source: str | Path, config: str | Path | None = None,
                     dtypes: Mapping[str, torch.dtype] | None = None, skip: Collection[str] = (),
                     revision: str | None = None, cache_dir: str | None = None) -> dict[str, Any]:
    """The components of an SDXL from one file; every tensor of the file has its place, or the file is refused.

    Args:
        source: a path, `https://huggingface.co/<org>/<repo>/blob/<revision>/<file>` or `<org>/<repo>/<file>`.
        config: a diffusers folder whose component configs, scheduler and tokenizers hold for the file; None means
            those of SDXL's base or refiner 1.0, which come with the package.
        dtypes: component name -> dtype of its weights; float32 for the others.
        skip: components not to load, e.g. `{'vae'}` for a file that has none.
        revision, cache_dir: of the hub.

    Returns:
        unet, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, scheduler; None for what `skip` or the
        config's model_index.json leaves out (a refiner has no text_encoder). Models are in eval mode. And `index`, that
        model_index.json.

    Raises:
        ValueError: the file is missing, truncated, not an SDXL, holds code, or its tensors don't fit: which.
    """
    content = _model_index(Path(config)) if config else {}
    path = local_path(source, revision, cache_dir)
    tensors = read_tensors(path)
    refiner = any(k.startswith(f'{EMBEDDER.format(0)}model.') for k in tensors)
    folder = Path(config or (REFINER_FILES if refiner else SDXL_FILES))
    content = content or _model_index(folder)
    index = {n: bool((content.get(n) or [None])[0]) for n in COMPONENTS}
    wanted = [n for n in ('unet', 'vae', 'text_encoder', 'text_encoder_2') if index[n] and n not in skip]
    prefixes = {'unet': UNET, 'vae': VAE, 'text_encoder': EMBEDDER.format(0),
                'text_encoder_2': EMBEDDER.format(1 if index['text_encoder'] else 0)}
    _check_kind(path, tensors, {n: prefixes[n] for n in wanted})
    models = {n: empty_model(n, folder) for n in wanted}
    origins = {n: dict(_origins(n, models[n], prefixes[n])) for n in wanted}
    _check_fit(path, tensors, models, origins, [prefixes[n] for n in wanted])
    parts: dict[str, Any] = dict.fromkeys(index)
    for name, model in models.items():
        _fill(model, tensors, origins[name], (dtypes or {}).get(name, torch.float32))
        parts[name] = model
    used = len({o.key for found in origins.values() for o in found.values()})
    print_log(f"'{path}': {used} of {len(tensors)} tensors used, {len(tensors) - used} are no weights of "
              f'{", ".join(wanted)}.', logger='current')
    return {**parts, **_without_weights(folder, index), 'index': content}


def load_single_part(name: str, source: str | Path, config: str | Path | None = None,
                     dtype: torch.dtype = torch.float32, revision: str | None = None,
                     cache_dir: str | None = None) -> nn.Module:
    """A UNet or a VAE from one file: of it alone, in the original layout or in diffusers', or of a whole model.

    Args:
        name: 'unet' or 'vae'.
        source, config, revision, cache_dir: as load_single_file. dtype: of its weights.

    Raises:
        ValueError: as load_single_file.
    """
    path = local_path(source, revision, cache_dir)
    tensors = read_tensors(path)
    whole, begin, blocks, inside = _ALONE[name]
    prefix = whole if any(k.startswith(whole) for k in tensors) else ''
    of_diffusers = any(k.startswith(blocks) for k in tensors)
    if not of_diffusers and f'{prefix}{begin}' not in tensors:
        raise ValueError(f"'{path}' holds no {_SHOWN[name]}; {_what_it_is(tensors)}.")
    model = empty_model(name, Path(config or SDXL_FILES))
    origins = {k: Origin(k) for k in model.state_dict()} if of_diffusers else dict(_origins(name, model, prefix))
    _check_fit(path, tensors, {name: model}, {name: origins}, [f'{prefix}{part}' for part in inside])
    _fill(model, tensors, origins, dtype)
    return model


def local_path(source: str | Path, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The file on this machine, fetched from the hub if `source` is a link or `<org>/<repo>/<file>`.

    Raises:
        ValueError: there is no such file, or the hub cannot be reached.
    """
    text, path = str(source), Path(source).expanduser()
    if os.path.isfile(path):  # unlike Path's own it takes a name of any length
        return path
    link = hub.link(text)
    plain = re.fullmatch(r'([\w-][\w.-]*/[\w-][\w.-]*)/(.+)', text)
    if link:
        repo, name, revision = link[0], link[2], revision or link[1]
    elif plain and not Path(text.split('/')[0]).is_dir():
        repo, name = plain[1], plain[2]
    else:
        raise ValueError(f"'{text}' is no file, and no link to one on the hub "
                         "('https://huggingface.co/<org>/<repo>/blob/main/<file>' or '<org>/<repo>/<file>')."
                         f'{hub.beside(path)}')
    return hub.fetch_file(repo, name, revision, cache_dir)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file by name, mapped into memory where the format allows it; no code in it is run.

    Raises:
        ValueError: truncated, another format, or a pickle that holds more than tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        if path.suffix == '.safetensors':
            return load_file(path)
        content = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(_unreadable(path, error)) from error
    while isinstance(content, dict) and isinstance(content.get('state_dict'), dict):
        content = content['state_dict']
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__} and not named tensors.")
    return {k: v for k, v in content.items() if isinstance(v, Tensor)}


def _unreadable(path: Path, error: Exception) -> str:
    with path.open('rb') as file:
        begin = file.read(40)
    if begin.startswith(b'version https://git-lfs'):
        return f"'{path}' is a note of git-lfs in place of the file: run `git lfs pull` in its folder."
    if isinstance(error, pickle.UnpicklingError):
        # torch's own words advise `weights_only=False`, so they are not passed on.
        code = re.search(r'(?:GLOBAL|class) (\S+)', str(error))
        holds = f"would run code ('{code[1]}')" if code else 'holds more than tensors, or is truncated,'
        return (f"'{path}' is a pickle that {holds} and was not opened; nothing of it was run. "
                'Take the .safetensors of this model, or convert it where you trust it.')
    return (f"'{path}' cannot be read; it is truncated or no {path.suffix} file ({path.stat().st_size:,} bytes): "
            f'{(str(error).strip() or type(error).__name__).splitlines()[0]}')


def empty_model(name: str, folder: Path) -> nn.Module:
    """Component `name` by its config in `folder`, in eval mode, its parameters on the meta device.

    Raises:
        ValueError: there is no such config.
    """
    import diffusers
    import transformers
    from accelerate import init_empty_weights
    cls: Any = {'unet': diffusers.UNet2DConditionModel, 'vae': diffusers.AutoencoderKL,
                'text_encoder': transformers.CLIPTextModel,
                'text_encoder_2': transformers.CLIPTextModelWithProjection}[name]
    folder = _holder(name, folder)
    place = folder / name if (folder / name).is_dir() else folder
    if not (place / 'config.json').is_file():
        raise ValueError(f"'{folder}' has no {name}/config.json, which says what the single file holds.")
    # Parameters only: transformers 5 keeps buffers such as position_ids out of the state dict, so on the meta
    # device they would never get their values.
    with init_empty_weights(include_buffers=False):
        if issubclass(cls, diffusers.ModelMixin):
            return cls.from_config(cls.load_config(place)).eval()
        return cls(cls.config_class.from_pretrained(place)).eval()


def _model_index(folder: Path) -> dict[str, Any]:
    path = folder / 'model_index.json'
    if not path.is_file():
        raise ValueError(f"'{folder}' holds no model_index.json; the config of a single file is a diffusers folder.")
    index: dict[str, Any] = json.loads(path.read_text())
    return index


def _holder(name: str, folder: Path) -> Path:
    """The folder that has the folder of component `name`."""
    return SDXL_FILES if folder == REFINER_FILES and not (folder / name).is_dir() else folder


def _without_weights(folder: Path, index: Mapping[str, bool]) -> dict[str, Any]:
    import diffusers
    import transformers
    tokenizers = {n: transformers.CLIPTokenizer.from_pretrained(_holder(n, folder), subfolder=n) if index[n] else None
                  for n in ('tokenizer', 'tokenizer_2')}
    folder = _holder('scheduler', folder)
    scheduler = json.loads((folder / 'scheduler' / 'scheduler_config.json').read_text())['_class_name']
    if not issubclass(getattr(diffusers, scheduler, object), diffusers.SchedulerMixin):
        raise ValueError(f"'{folder}/scheduler' names '{scheduler}', which is no scheduler of diffusers.")
    return {**tokenizers, 'scheduler': getattr(diffusers, scheduler).from_pretrained(folder, subfolder='scheduler')}


def _origins(name: str, model: nn.Module, prefix: str) -> Iterator[tuple[str, Origin]]:
    rule: Callable[[str, Any], Origin] = {'unet': _unet_origin, 'vae': _vae_origin, 'text_encoder': _clip_origin,
                                          'text_encoder_2': _open_clip_origin}[name]
    for key in model.state_dict():
        origin = rule(key, model.config)
        yield key, origin._replace(key=prefix + origin.key)


def _renamed(key: str, names: Names) -> str:
    # Whole dotted words only, so that 'norm1' is not found in 'layer_norm1'.
    for new, old in names.items():
        key = re.sub(rf'(?<![^.]){re.escape(new)}(?![^.])', old, key)
    return key


def _unet_origin(key: str, config: Any) -> Origin:
    """The blocks of all levels are numbered through; a level has `layers_per_block` of them and one for the sampler."""
    match = re.fullmatch(r'(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)', key)
    if not match:
        middle = re.fullmatch(r'(mid_block\.resnets\.\d+)\.(.+)', key)
        return Origin(_renamed(f'{middle[1]}.{_renamed(middle[2], _UNET_RESNET)}' if middle else key, _UNET_TOP))
    side, level, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    num = config.layers_per_block + 1
    if kind == 'resnets':
        rest = f'0.{_renamed(rest, _UNET_RESNET)}'
    elif kind == 'attentions':
        rest = f'1.{rest}'
    elif kind == 'downsamplers':
        layer, rest = num - 1, f'0.{_renamed(rest, {"conv": "op"})}'
    else:
        layer, rest = num - 1, f'{2 if "CrossAttn" in config.up_block_types[level] else 1}.{rest}'
    number = level * num + layer
    return Origin(f'input_blocks.{number + 1}.{rest}' if side == 'down' else f'output_blocks.{number}.{rest}')


def _vae_origin(key: str, config: Any) -> Origin:
    def level(match: re.Match[str]) -> str:
        # The original counts the decoder's levels from the image, diffusers from the latents.
        number = int(match[2]) if match[1] == 'down' else len(config.up_block_types) - 1 - int(match[2])
        return f'{match[1]}.{number}.'

    key = re.sub(r'(down|up)_blocks\.(\d+)\.', level, key)
    return Origin(re.sub(r'\bresnets\.', 'block.', _renamed(key, _VAE)))


def _clip_origin(key: str, config: Any) -> Origin:
    # transformers 5.6 dropped the `text_model.` in CLIPTextModel's names.
    return Origin(f'transformer.text_model.{key.removeprefix("text_model.")}')


def _open_clip_origin(key: str, config: Any) -> Origin:
    """open_clip holds query, key and value in one tensor, and its projection the other way round."""
    key = key.removeprefix('text_model.')
    if key == 'text_projection.weight':
        return Origin('model.text_projection', transposed=True)
    fused = re.fullmatch(r'encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)', key)
    if fused:
        return Origin(f'model.transformer.resblocks.{fused[1]}.attn.in_proj_{fused[3]}', third='qkv'.index(fused[2]))
    return Origin(f'model.{_renamed(key, _OPEN_CLIP)}')


def _check_kind(path: Path, tensors: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> None:
    absent = {n: p for n, p in prefixes.items() if not any(k.startswith(p) for k in tensors)}
    if absent or f'{UNET}label_emb.0.0.weight' not in tensors and 'unet' in prefixes:
        lacks = ''.join(f", it has no {n} ('{p}*')" for n, p in absent.items())
        raise ValueError(f"'{path}' is not a whole SDXL in the original layout: {_what_it_is(tensors)}{lacks}.")


def _what_it_is(tensors: Mapping[str, Tensor]) -> str:
    def has(*parts: str) -> bool:
        return any(part in key for key in tensors for part in parts)

    width = tensors.get(f'{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight')
    kinds = {
        'a LoRA': has('lora_', '.lora'),
        'a Stable Diffusion 3': has('.joint_blocks.'),
        'a Flux': has('double_blocks.'),
        'a Stable Diffusion 1.x': has('cond_stage_model.transformer.') or width is not None and width.shape[1] == 768,
        'a Stable Diffusion 2.x': has('cond_stage_model.model.') or width is not None and width.shape[1] == 1024,
        'a ControlNet': has('control_model.', 'controlnet'),
        'an SDXL refiner': has('conditioner.embedders.0.model.'),
        'an SDXL of which a part is missing': has('label_emb.0.0.weight', 'conditioner.embedders.'),
        "a UNet or VAE in diffusers' layout": has('down_blocks.'),
        'a VAE alone': has('encoder.down.'),
    }
    known = [kind for kind, is_so in kinds.items() if is_so]
    return f'it is {known[0]}' if known else f'it holds {len(tensors)} tensors such as {sorted(tensors)[:3]}'


def _check_fit(path: Path, tensors: Mapping[str, Tensor], models: Mapping[str, nn.Module],
               origins: Mapping[str, Mapping[str, Origin]], prefixes: Collection[str]) -> None:
    """All is known from the file's header, so nothing is copied before everything fits."""
    wanted = {o.key for found in origins.values() for o in found.values()}
    shapes = [f'{origin.key} {list(tensors[origin.key].shape)}, {name}.{key} is {list(parameter.shape)}'
              for name, model in models.items() for key, parameter in model.state_dict().items()
              if (origin := origins[name][key]).key in tensors
              and origin.fit(tensors[origin.key], parameter.shape).shape != parameter.shape]
    over = [k for k in tensors if k.startswith(tuple(prefixes)) and k not in wanted and not _NOT_WEIGHTS.search(k)]
    faults = [f'{len(keys)} {what} ({"; ".join(keys[:10])}{"; ..." if len(keys) > 10 else ""})'
              for what, keys in (('tensors are missing', sorted(wanted - set(tensors))),
                                 ('tensors have no place', sorted(over)),
                                 ('tensors have another shape', shapes)) if keys]
    if faults:
        raise ValueError(f"'{path}' does not fit the configs of {', '.join(models)}: {', and '.join(faults)}. "
                         'Give a folder with configs that fit, or another file.')


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], origins: Mapping[str, Origin], dtype: torch.dtype) -> None:
    # Copies, of one component at a time: a mapped file that changes on disk would change the weights with it.
    weights = {}
    for key, parameter in model.state_dict().items():
        found = origins[key].fit(tensors[origins[key].key], parameter.shape)
        weights[key] = found.to(dtype, copy=True, memory_format=torch.contiguous_format)
    model.load_state_dict(weights, strict=True, assign=True)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
