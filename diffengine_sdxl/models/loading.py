"""SDXL's components from a diffusers folder, a hub id, a single file, or (random weights) from configs alone."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffengine_sdxl import rng
from diffengine_sdxl.models.single_file import SDXL_FILES, is_single_file, load_single_file, load_single_vae
from diffengine_sdxl.weights import load_pretrained, said, shipped

MODULES = ('unet', 'vae', 'text_encoder', 'text_encoder_2')
TOKENIZERS = ('tokenizer', 'tokenizer_2')


def module_class(name: str) -> Any:
    """The class of component `name`."""
    import diffusers
    import transformers
    return {'unet': diffusers.UNet2DConditionModel, 'vae': diffusers.AutoencoderKL,
            'text_encoder': transformers.CLIPTextModel, 'text_encoder_2': transformers.CLIPTextModelWithProjection,
            'tokenizer': transformers.CLIPTokenizer, 'tokenizer_2': transformers.CLIPTokenizer}[name]


def load_components(pretrained: str | None, vae: str | None, config: str | None, tokenizer: str | None,
                    dtypes: Mapping[str, torch.dtype], seed: int, given: Mapping[str, Any] | None = None,
                    **hub: Any) -> dict[str, Any]:
    """All parts of a base: unet, vae, text_encoder (None in a refiner), text_encoder_2, tokenizers, scheduler config.

    Also 'null_text': what the base's pipeline takes for no text, where its index says so.

    Args:
        pretrained: folder, hub id, single file, or 'diffengine_sdxl::<folder>' for what came with this package (so for
            the other sources, too); None makes random weights, keyed by `seed`.
        vae: folder, hub id or single file of another VAE; None takes the base's own.
        config: folder of component configs for a single file or for random weights; None means SDXL base 1.0's.
        tokenizer: folder or hub id of other tokenizers; None takes the base's own.
        dtypes: component name -> dtype of its weights.
        given: components of another model that this one shares, as they are.
        hub: `revision`, `variant`, `cache_dir`.

    Raises:
        ValueError: something is missing, is not SDXL, or cannot be had without a network.
    """
    pretrained, vae, config, tokenizer = (shipped(source) for source in (pretrained, vae, config, tokenizer))
    given = dict(given or {})
    skip = {*given, *(['vae'] if vae else [])}
    if pretrained is None:
        parts = _random_components(Path(config or SDXL_FILES), dtypes, seed, skip)
    elif is_single_file(pretrained):
        parts = load_single_file(pretrained, config=config, dtypes=dtypes, skip=tuple(skip),
                                 revision=hub.get('revision'), cache_dir=hub.get('cache_dir'))
        parts |= {'scheduler': dict(parts['scheduler'].config), 'null_text': _null_text(parts.pop('index'))}
    else:
        parts = _folder_components(str(pretrained), dtypes, skip=skip, **hub)
    parts.update(given)
    check_sdxl(parts['unet'], str(pretrained or config or 'SDXL'))
    if vae and 'vae' not in given:
        parts['vae'] = _load_vae(str(vae), config, dtypes['vae'], **hub)
    check_vae(parts['vae'], parts['unet'], str(vae or pretrained or config))
    if tokenizer:
        for name in TOKENIZERS:
            parts[name] = said(tokenizer, module_class(name).from_pretrained, tokenizer, subfolder=name,
                               cache_dir=hub.get('cache_dir'))
    for name in MODULES:
        if parts.get(name) is not None and name not in given and parts[name].dtype != dtypes[name]:
            parts[name].to(dtypes[name])
    return parts


def check_sdxl(unet: nn.Module, source: str) -> None:
    """Refuse a UNet that is not SDXL's kind.

    Raises:
        ValueError: it has no size and crop conditioning, so it is another architecture, e.g. SD 1.5.
    """
    kind = unet.config.addition_embed_type  # type: ignore[union-attr]
    if kind != 'text_time':
        width = unet.config.cross_attention_dim  # type: ignore[union-attr]
        raise ValueError(f"'{source}' is not an SDXL: its UNet has addition_embed_type={kind!r} (SDXL: 'text_time') "
                         f'and cross_attention_dim={width}. Stable Diffusion 1.x and 2.x cannot be used as a base.')


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new floating-point tensors are of `dtype`."""
    held = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(held)


def check_vae(vae: nn.Module, unet: nn.Module, source: str) -> None:
    """Refuse a VAE whose latents the UNet does not work on.

    Raises:
        ValueError: their channels differ.
    """
    theirs, ours = vae.config.latent_channels, unet.config.out_channels  # type: ignore[union-attr]
    if theirs != ours:
        raise ValueError(f"'{source}' is a VAE of {theirs} channels; the UNet works on {ours}.")


def _random_components(folder: Path, dtypes: Mapping[str, torch.dtype], seed: int, skip: set[str]) -> dict[str, Any]:
    import diffusers
    index = _index(folder)
    parts: dict[str, Any] = {'null_text': _null_text(index)}
    for name in (n for n in MODULES if n not in skip and index.get(n, [None])[0]):
        cls = module_class(name)
        # Made in their own dtype: the full UNet would take 10 GB on its way through fp32.
        with rng.fork(seed, 'base', name), default_dtype(dtypes[name]):
            if issubclass(cls, diffusers.ModelMixin):
                parts[name] = cls.from_config(cls.load_config(folder, subfolder=name))
            else:
                parts[name] = cls(cls.config_class.from_pretrained(folder, subfolder=name))
    for name in (n for n in TOKENIZERS if index.get(n, [None])[0]):
        parts[name] = module_class(name).from_pretrained(folder, subfolder=name)
    parts['scheduler'] = _scheduler_config(str(folder))
    return parts


def _folder_components(source: str, dtypes: Mapping[str, torch.dtype], skip: set[str], **hub: Any) -> dict[str, Any]:
    where = {k: v for k, v in hub.items() if k != 'variant'}
    local = Path(source).is_dir()
    if local:
        index = _index(Path(source))
    else:
        from diffusers import DiffusionPipeline
        index = said(source, DiffusionPipeline.load_config, source, **where)
    parts: dict[str, Any] = {'null_text': _null_text(index)}
    for name in (n for n in (*MODULES, *TOKENIZERS) if n not in skip and index.get(n, [None])[0]):
        if local and not (Path(source) / name).is_dir():
            raise ValueError(f"'{source}' has no folder '{name}', but its model_index.json names one.")
        if name in MODULES:
            parts[name] = _from_pretrained(name, source, dtypes[name], subfolder=name, **hub)
        else:
            parts[name] = said(source, module_class(name).from_pretrained, source, subfolder=name, **where)
    for name in ('unet', 'text_encoder_2', 'tokenizer_2'):
        if name not in parts and name not in skip:
            raise ValueError(f"'{source}' has no '{name}', so it is no SDXL base "
                             f'(it holds {", ".join(sorted(k for k in index if not k.startswith("_")))}).')
    parts['scheduler'] = said(source, _scheduler_config, source, **where)
    return parts


def _from_pretrained(name: str, source: str, dtype: torch.dtype, **kwargs: Any) -> Any:
    return load_pretrained(module_class(name), source, dtype=dtype, **kwargs)


def _load_vae(source: str, config: str | None, dtype: torch.dtype, **hub: Any) -> Any:
    if is_single_file(source):
        return load_single_vae(source, config=config, dtype=dtype, cache_dir=hub.get('cache_dir'))
    folder = Path(source)
    subfolder = 'vae' if not (folder / 'config.json').is_file() and (folder / 'vae').is_dir() else None
    # `revision` and `variant` are the base's; another repository has its own.
    return _from_pretrained('vae', source, dtype, subfolder=subfolder, cache_dir=hub.get('cache_dir'))


def _index(folder: Path) -> dict[str, Any]:
    path = folder / 'model_index.json'
    if not path.is_file():
        raise ValueError(f"'{folder}' holds no model_index.json, so it is not a diffusers folder.")
    return json.loads(path.read_text())


def _null_text(index: Mapping[str, Any]) -> str:
    """What stands for no text in the pipeline of `index`: SDXL's base says zeros, the refiner the empty prompt."""
    return 'zeros' if index.get('force_zeros_for_empty_prompt', True) else 'empty'


def _scheduler_config(source: str, **hub: Any) -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler
    config = EulerDiscreteScheduler.load_config(source, subfolder='scheduler', **hub)
    return {k: v for k, v in dict(config).items() if not k.startswith('_')}

