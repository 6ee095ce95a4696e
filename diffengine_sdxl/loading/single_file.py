"""A whole SDXL in one `.safetensors` or `.ckpt` file, in Stability's original layout.

diffusers' `from_single_file` reads such files too; the tests compare with it. It is not strict, so it is not used:
it skips tensors that it has no rule for, leaves missing ones on the meta device, confuses text encoders of the same
width, and takes one dtype for all. Checking it from outside would take the map of names that is all this file needs.
"""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from diffengine_sdxl.errors import UserError, is_out_of_memory, listed
from diffengine_sdxl.loading import hub
from diffengine_sdxl.loading.component_checks import check_scheduler, check_settings
from diffengine_sdxl.loading.files import TORCH_LOAD_ERRORS, has_component, read_index, read_json
from diffengine_sdxl.loading.strict import as_user_error
from diffengine_sdxl.loading.unet_keys import original_names
from diffengine_sdxl.loading.weights import check_dtypes, check_finite, read_pickle, unreadable

SDXL_FILES = Path(__file__).parent / 'sdxl_files'
#: Configs of the refiner that differ from SDXL_FILES.
REFINER_FILES = Path(__file__).parent / 'refiner_files'
MODULES = ('unet', 'vae', 'text_encoder', 'text_encoder_2')
TOKENIZERS = ('tokenizer', 'tokenizer_2')
SUFFIXES = ('.safetensors', '.ckpt', '.pt', '.bin')

UNET, VAE = 'model.diffusion_model.', 'first_stage_model.'
EMBEDDER = 'conditioner.embedders.{}.'


class _SinglePart(NamedTuple):
    """How to recognize a file of a UNet or VAE only."""

    title: str
    prefix: str  # in the file of a whole model
    key: str  # of the original layout
    diffusers_prefix: str  # of some keys in diffusers' layout
    prefixes: tuple[str, ...]  # of all its keys in the original layout


_SINGLE_PARTS = {
    'unet': _SinglePart('UNet', UNET, 'input_blocks.0.0.weight', 'down_blocks.', ('',)),
    'vae': _SinglePart('VAE', VAE, 'encoder.conv_in.weight', 'encoder.down_blocks.', ('encoder.', 'decoder.'))}

Names = Mapping[str, str]
_VAE: Names = {
    'mid_block.resnets.0': 'mid.block_1', 'mid_block.resnets.1': 'mid.block_2', 'mid_block.attentions.0': 'mid.attn_1',
    'conv_norm_out': 'norm_out', 'conv_shortcut': 'nin_shortcut', 'group_norm': 'norm', 'to_q': 'q', 'to_k': 'k',
    'to_v': 'v', 'to_out.0': 'proj_out', 'downsamplers.0': 'downsample', 'upsamplers.0': 'upsample'}
_OPEN_CLIP: Names = {
    'embeddings.token_embedding': 'token_embedding', 'embeddings.position_embedding.weight': 'positional_embedding',
    'final_layer_norm': 'ln_final', 'encoder.layers': 'transformer.resblocks', 'layer_norm1': 'ln_1',
    'layer_norm2': 'ln_2', 'mlp.fc1': 'mlp.c_fc', 'mlp.fc2': 'mlp.c_proj', 'self_attn.out_proj': 'attn.out_proj'}
# Buffers that the models compute, and open_clip's contrastive temperature.
_NOT_WEIGHTS = re.compile(r'(\.position_ids|\.logit_scale|\.attn_mask)$')


class Origin(NamedTuple):
    """Where a parameter is in the file: its key, which third of the tensor, and whether it is transposed."""

    key: str
    third: int | None = None
    transposed: bool = False

    def fit(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """Return the view of the file's tensor that is this parameter, of `shape`."""
        # A tensor with other dimensions stays as it is: its shape differs and is reported.
        if self.third is not None and tensor.dim() and len(tensor) >= 3:
            tensor = tensor.chunk(3)[self.third]
        if self.transposed and tensor.dim() == 2:
            tensor = tensor.t()
        # The original VAE's attention has 1x1 convolutions; diffusers' has linear layers.
        return tensor.flatten(1) if tensor.dim() == 4 and tensor.shape[2:] == (1, 1) and len(shape) == 2 else tensor


Origins = dict[str, Origin]


def is_single_file(source: str | Path) -> bool:
    """Whether `source` names a single file (path, link or `org/repo/file.safetensors`), not a folder or a hub id."""
    return str(source).split('?')[0].endswith(SUFFIXES) and not os.path.isdir(source)


def module_class(name: str) -> Any:
    """Return the class of component `name`."""
    import diffusers
    import transformers
    return {'unet': diffusers.UNet2DConditionModel, 'vae': diffusers.AutoencoderKL,
            'text_encoder': transformers.CLIPTextModel, 'text_encoder_2': transformers.CLIPTextModelWithProjection,
            'tokenizer': transformers.CLIPTokenizer, 'tokenizer_2': transformers.CLIPTokenizer}[name]


def load_single_file(source: str | Path, config: str | Path | None = None,
                     dtypes: Mapping[str, torch.dtype] | None = None, skip: Collection[str] = (),
                     revision: str | None = None, cache_dir: str | None = None) -> dict[str, Any]:
    """Load the components of an SDXL from one file; every tensor of the file is used, or the file is refused.

    Args:
        source: a path, `https://huggingface.co/<org>/<repo>/blob/<revision>/<file>` or `<org>/<repo>/<file>`.
        config: a diffusers folder with the component configs, scheduler and tokenizers of the file; None means those
            of SDXL's base or refiner 1.0, which are part of this package.
        dtypes: component name -> dtype of its weights; float32 for the others.
        skip: components not to load, e.g. `{'vae'}` for a file without one.
        revision, cache_dir: of the hub.

    Returns:
        unet, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, scheduler; None for what `skip` or the
        config's model_index.json leaves out (a refiner has no text_encoder). Models are in eval mode. And `index`, that
        model_index.json, and `folder`, the Path of the configs.

    Raises:
        UserError: the file is missing, truncated, not an SDXL, holds code, or its tensors don't fit: which.
    """
    index = read_index(Path(config)) if config else {}
    path = resolve_file(source, revision, cache_dir)
    tensors = read_tensors(path)
    is_refiner = any(k.startswith(f'{EMBEDDER.format(0)}model.') for k in tensors)
    folder = Path(config or (REFINER_FILES if is_refiner else SDXL_FILES))
    index = index or read_index(folder)
    names = [n for n in MODULES if has_component(index, n) and n not in skip]
    prefixes = {'unet': UNET, 'vae': VAE, 'text_encoder': EMBEDDER.format(0),
                'text_encoder_2': EMBEDDER.format(1 if has_component(index, 'text_encoder') else 0)}
    _check_kind(path, tensors, {n: prefixes[n] for n in names})
    models = {n: empty_model(n, folder) for n in names}
    origins = {n: find_origins(n, models[n], prefixes[n]) for n in names}
    _check_fit(path, tensors, models, origins, [prefixes[n] for n in names])
    for name, model in models.items():
        _fill(path, model, tensors, origins[name], (dtypes or {}).get(name, torch.float32))
    num_used = len({o.key for part in origins.values() for o in part.values()})
    print_log(f"'{path}': {num_used} of {len(tensors)} tensors used, {len(tensors) - num_used} are not weights of "
              f'{", ".join(names)}.', logger='current')
    tokenizers = {n: as_user_error(str(folder), module_class(n).from_pretrained, config_folder(n, folder), subfolder=n)
                  if has_component(index, n) else None for n in TOKENIZERS}
    return {**dict.fromkeys(MODULES), **models, **tokenizers, 'scheduler': _scheduler(folder), 'index': index,
            'folder': folder}


def load_single_part(name: str, source: str | Path, config: str | Path | None = None,
                     dtype: torch.dtype = torch.float32, revision: str | None = None,
                     cache_dir: str | None = None) -> nn.Module:
    """Load a UNet or VAE from a file of it alone, in the original layout or diffusers', or of a whole model.

    Args:
        name: 'unet' or 'vae'.
        source, config, revision, cache_dir: as load_single_file.
        dtype: of its weights.

    Raises:
        UserError: as load_single_file.
    """
    path = resolve_file(source, revision, cache_dir)
    tensors = read_tensors(path)
    part = _SINGLE_PARTS[name]
    prefix = part.prefix if any(k.startswith(part.prefix) for k in tensors) else ''
    is_diffusers = any(k.startswith(part.diffusers_prefix) for k in tensors)
    if not is_diffusers and f'{prefix}{part.key}' not in tensors:
        raise UserError(f"'{path}' has no {part.title}; {_describe(tensors)}.")
    model = empty_model(name, Path(config or SDXL_FILES))
    origins = {k: Origin(k) for k in model.state_dict()} if is_diffusers else find_origins(name, model, prefix)
    _check_fit(path, tensors, {name: model}, {name: origins}, [prefix + inner for inner in part.prefixes])
    _fill(path, model, tensors, origins, dtype)
    return model


def resolve_file(source: str | Path, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """Return the local file, downloaded from the hub if `source` is a link or `<org>/<repo>/<file>`.

    Raises:
        UserError: there is no such file, or the hub cannot be reached.
    """
    text, path = str(source), Path(os.path.expanduser(source))
    if os.path.isfile(path):  # unlike Path.is_file, accepts names of any length
        return path
    link = hub.parse_file_link(text)
    in_repo = re.fullmatch(r'([\w-][\w.-]*/[\w-][\w.-]*)/(.+)', text)
    if link:
        return hub.fetch_file(link[0], link[2], revision or link[1], cache_dir)
    if in_repo and not Path(text.split('/')[0]).is_dir():
        return hub.fetch_file(in_repo[1], in_repo[2], revision, cache_dir)
    raise UserError(f"'{text}' is neither a file nor a link to one on the hub "
                    "('https://huggingface.co/<org>/<repo>/blob/main/<file>' or '<org>/<repo>/<file>')."
                    f'{hub.suggest_sibling(path)}')


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file by name, memory-mapped if the format allows it, without running code in it.

    Raises:
        UserError: truncated, another format, or a pickle that holds more than tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    if path.suffix == '.safetensors':
        try:
            return load_file(path)
        except (SafetensorError, *TORCH_LOAD_ERRORS) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(unreadable(path, error)) from error
    content = read_pickle(path, mmap=True)
    while isinstance(content, dict) and isinstance(content.get('state_dict'), dict):
        content = content['state_dict']
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds a {type(content).__name__}, not named tensors.")
    return {k: v for k, v in content.items() if isinstance(v, Tensor)}


def empty_model(name: str, folder: Path) -> nn.Module:
    """Build component `name` from its config in `folder`, in eval mode, with parameters on the meta device.

    Raises:
        UserError: the config is missing or invalid.
    """
    from accelerate import init_empty_weights
    folder = config_folder(name, folder)
    path = folder / name if (folder / name).is_dir() else folder
    if not (path / 'config.json').is_file():
        raise UserError(f"'{folder}' has no {name}/config.json, which is needed to read the single file.")
    check_settings(module_class(name), path, str(path))
    # Parameters only: transformers 5 does not save buffers such as position_ids, so on the meta device they would never
    # get their values.
    with init_empty_weights(include_buffers=False):
        return build_module(name, path).eval()


def build_module(name: str, folder: Path, subfolder: str | None = None) -> nn.Module:
    """Build component `name` from its config alone.

    Raises:
        UserError: the config is missing or invalid.
    """
    import diffusers
    cls = module_class(name)

    def build() -> nn.Module:
        where = {'subfolder': subfolder} if subfolder else {}
        if issubclass(cls, diffusers.ModelMixin):
            model: nn.Module = cls.from_config(cls.load_config(folder, **where))
        else:
            model = cls(cls.config_class.from_pretrained(folder, **where))
        return model
    shown = f'{folder}/{subfolder}' if subfolder else str(folder)
    if subfolder:
        check_settings(cls, folder / subfolder, shown)
    model: nn.Module = as_user_error(shown, build)
    return model


def config_folder(name: str, folder: Path) -> Path:
    """Return the folder that holds the config folder of component `name`."""
    return SDXL_FILES if folder == REFINER_FILES and not (folder / name).is_dir() else folder


def _scheduler(folder: Path) -> Any:
    import diffusers
    folder = config_folder('scheduler', folder)
    config = read_json(folder / 'scheduler' / 'scheduler_config.json')
    check_scheduler(config, f'{folder}/scheduler')
    name = config.get('_class_name')
    cls: Any = getattr(diffusers, str(name), object)
    if not issubclass(cls, diffusers.SchedulerMixin):
        raise UserError(f"'{folder}/scheduler' names '{name}', which is not a scheduler of diffusers.")
    return as_user_error(f'{folder}/scheduler', cls.from_pretrained, folder, subfolder='scheduler')


def find_origins(name: str, model: nn.Module, prefix: str) -> Origins:
    """Return parameter -> where it is in a file of the original layout, for component `name`."""
    keys, config = list(model.state_dict()), model.config
    if name == 'unet':
        modules = original_names({key.rpartition('.')[0] for key in keys})
        origins = {key: Origin(f'{modules.get(module, module)}.{leaf}') for key in keys
                   for module, _, leaf in [key.rpartition('.')]}
    elif name == 'vae':
        origins = {key: _vae_origin(key, len(config.up_block_types)) for key in keys}  # type: ignore[union-attr,arg-type]
    elif name == 'text_encoder':
        # transformers 5.6 dropped the `text_model.` in CLIPTextModel's names.
        origins = {key: Origin(f'transformer.text_model.{key.removeprefix("text_model.")}') for key in keys}
    else:
        origins = {key: _open_clip_origin(key) for key in keys}
    return {key: origin._replace(key=prefix + origin.key) for key, origin in origins.items()}


def _renamed(key: str, names: Names) -> str:
    # Whole dotted words only, so that 'norm1' does not match in 'layer_norm1'.
    for new, old in names.items():
        key = re.sub(rf'(?<![^.]){re.escape(new)}(?![^.])', old, key)
    return key


def _vae_origin(key: str, num_levels: int) -> Origin:
    def level(match: re.Match[str]) -> str:
        # The original counts the decoder's levels from the image, diffusers from the latents.
        return f'{match[1]}.{match[2] if match[1] == "down" else num_levels - 1 - int(match[2])}.'

    key = re.sub(r'(down|up)_blocks\.(\d+)\.', level, key)
    return Origin(re.sub(r'\bresnets\.', 'block.', _renamed(key, _VAE)))


def _open_clip_origin(key: str) -> Origin:
    """Map to open_clip's names; its query, key and value are one tensor, and its projection is transposed."""
    key = key.removeprefix('text_model.')
    if key == 'text_projection.weight':
        return Origin('model.text_projection', transposed=True)
    if fused := re.fullmatch(r'encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)', key):
        return Origin(f'model.transformer.resblocks.{fused[1]}.attn.in_proj_{fused[3]}', third='qkv'.index(fused[2]))
    return Origin(f'model.{_renamed(key, _OPEN_CLIP)}')


def _check_kind(path: Path, tensors: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> None:
    absent = {n: p for n, p in prefixes.items() if not any(k.startswith(p) for k in tensors)}
    if absent or f'{UNET}label_emb.0.0.weight' not in tensors and 'unet' in prefixes:
        lacks = ''.join(f", it has no {n} ('{p}*')" for n, p in absent.items())
        raise UserError(f"'{path}' is not a whole SDXL in the original layout: {_describe(tensors)}{lacks}.")


def _describe(tensors: Mapping[str, Tensor]) -> str:
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
        'an SDXL without some of its parts': has('label_emb.0.0.weight', 'conditioner.embedders.'),
        "a UNet or VAE in diffusers' layout": has('down_blocks.'),
        'a VAE only': has('encoder.down.'),
    }
    kind = next((kind for kind, matches in kinds.items() if matches), None)
    return f'it is {kind}' if kind else f'it holds {len(tensors)} tensors such as {sorted(tensors)[:3]}'


def _check_fit(path: Path, tensors: Mapping[str, Tensor], models: Mapping[str, nn.Module],
               origins: Mapping[str, Origins], prefixes: Collection[str]) -> None:
    """Check names and shapes, which are known from the file's header, before anything is copied."""
    expected = {o.key for part in origins.values() for o in part.values()}
    shapes = [f'{origin.key} {list(tensors[origin.key].shape)}, {name}.{key} is {list(parameter.shape)}'
              for name, model in models.items() for key, parameter in model.state_dict().items()
              if (origin := origins[name][key]).key in tensors
              and origin.fit(tensors[origin.key], parameter.shape).shape != parameter.shape]
    surplus = [k for k in tensors if k.startswith(tuple(prefixes)) and k not in expected and not _NOT_WEIGHTS.search(k)]
    faults = [f'{len(keys)} {what} ({listed(keys)})' for what, keys in (
        ('tensors are missing', sorted(expected - set(tensors))), ('tensors are unexpected', sorted(surplus)),
        ('tensors have another shape', shapes)) if keys]
    if faults:
        raise UserError(f"'{path}' does not fit the configs of {', '.join(models)}: {', and '.join(faults)}. "
                        'Give a folder with configs that fit, or another file.')


def _fill(path: Path, model: nn.Module, tensors: Mapping[str, Tensor], origins: Origins, dtype: torch.dtype) -> None:
    """Copy a file's tensors into a model, in `dtype`; all must be finite floating-point numbers."""
    check_dtypes(((origin.key, tensors[origin.key].dtype) for origin in origins.values()), path)
    # Copies, of one component at a time: a mapped file that changes on disk would change the weights with it.
    weights = {}
    for key, parameter in model.state_dict().items():
        tensor = origins[key].fit(tensors[origins[key].key], parameter.shape)
        weights[key] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    check_finite(((origins[key].key, tensor) for key, tensor in weights.items()), path, dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
