"""SDXL's components from a diffusers folder, a hub id, a single file, or (with random weights) from configs alone."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import nn

from diffengine_sdxl import rng
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading import hub
from diffengine_sdxl.loading.component_checks import check_files, check_scheduler
from diffengine_sdxl.loading.deferred import Deferred
from diffengine_sdxl.loading.digests import Source
from diffengine_sdxl.loading.files import has_component, read_index, read_json, variants, weight_files
from diffengine_sdxl.loading.single_file import (
    MODULES,
    SDXL_FILES,
    TOKENIZERS,
    build_module,
    config_folder,
    empty_model,
    is_single_file,
    load_single_file,
    load_single_part,
    module_class,
    resolve_file,
)
from diffengine_sdxl.loading.strict import as_user_error, load_pretrained, shipped

__all__ = ['MODULES', 'TOKENIZERS', 'load_components', 'load_tokenizers', 'module_class']


def load_components(pretrained: str | None, vae: str | None, config: str | None, tokenizer: str | None,
                    dtypes: Mapping[str, torch.dtype], seed: int, shared: Mapping[str, Any] | None = None,
                    unet: str | None = None, revision: str | None = None, variant: str | None = None,
                    cache_dir: str | None = None, half: torch.dtype | None = None,
                    lazy: Collection[str] = ()) -> dict[str, Any]:
    """Load unet, vae, text_encoder (None in a refiner), text_encoder_2, tokenizers and scheduler config of a base.

    Also 'null_prompt': what the base's pipeline uses for an absent prompt, if its index says so.

    Args:
        pretrained: folder, hub id, single file, or 'diffengine_sdxl::<folder>' of this package (as for the other
            sources); None makes random weights, keyed by `seed`.
        vae, unet: folder, hub id or single file of another VAE or UNet; None uses the base's own.
        config: folder of component configs for a single file or for random weights; None means SDXL base 1.0's.
        tokenizer: folder or hub id of other tokenizers; None uses the base's own.
        dtypes: component name -> dtype of its weights; without 'vae' that depends on the VAE.
        half: dtype of such a VAE if it does not overflow in fp16 (`force_upcast` False in its config, as that of
            madebyollin/sdxl-vae-fp16-fix); one that does (SDXL's own) is in fp32, and so is any if `half` is None.
        shared: components of another model, used as they are.
        revision, variant, cache_dir: of the hub; `revision` and `variant` are the base's. Another UNet or VAE is loaded
            in a variant if it has no other weights.
        lazy: components that are loaded at their first use: of these the result has a Deferred.

    Raises:
        UserError: something is missing, is not SDXL, or cannot be downloaded.
    """
    pretrained, unet, vae, config, tokenizer = map(shipped, (pretrained, unet, vae, config, tokenizer))
    half = None if 'vae' in dtypes else half
    shared, dtypes = dict(shared or {}), {'vae': torch.float32, **dtypes}
    others = {name: source for name, source in (('unet', unet), ('vae', vae)) if source and name not in shared}
    skip = {*shared, *others}
    if pretrained is None:
        parts = _random_components(Path(config or SDXL_FILES), dtypes, seed, skip, lazy)
    elif is_single_file(pretrained):
        parts = _file_components(pretrained, config, dtypes, skip, revision, cache_dir, lazy)
    else:
        folder = _base_folder(pretrained, skip, revision, variant, cache_dir)
        parts = _folder_components(folder, pretrained, dtypes, skip, variant, lazy)
    parts.update(shared)
    for name, source in others.items():
        parts[name] = _load_other(name, source, config, dtypes[name], cache_dir, variant, lazy)
    _check_sdxl(parts['unet'], str(unet or pretrained or config or 'SDXL'))
    _check_widths(parts, str(unet or pretrained or config))
    _check_vae(parts['vae'], parts['unet'], str(vae or pretrained or config))
    if tokenizer:
        folder = _tokenizer_folder(tokenizer, cache_dir)
        for name in TOKENIZERS:
            parts[name] = _load_tokenizer(name, folder, tokenizer)
    _check_tokenizers(parts, str(tokenizer or pretrained or config))
    if half is not None and not parts['vae'].config.force_upcast:
        dtypes['vae'] = half
    for name in MODULES:
        part = parts.get(name)
        if isinstance(part, Deferred):
            part.dtype = dtypes[name]
        elif part is not None and name not in shared and part.dtype != dtypes[name]:
            part.to(dtypes[name])
    return parts


def load_tokenizers(pretrained: str | None, config: str | None = None, tokenizer: str | None = None,
                    revision: str | None = None, cache_dir: str | None = None) -> dict[str, Any]:
    """Load the tokenizers alone that `load_components` would load; None for one that the base has not.

    Raises:
        UserError: see `load_components`.
    """
    pretrained, config, tokenizer = map(shipped, (pretrained, config, tokenizer))
    if tokenizer:
        folder, shown = _tokenizer_folder(tokenizer, cache_dir), tokenizer
        return {name: _load_tokenizer(name, folder, shown) for name in TOKENIZERS}
    if pretrained is None or is_single_file(pretrained):
        folder = Path(config or SDXL_FILES)
    else:
        folder = _base_folder(pretrained, {*MODULES}, revision, None, cache_dir)
    index = read_index(folder, pretrained)
    return {name: _load_tokenizer(name, folder, str(pretrained or folder)) if has_component(index, name) else None
            for name in TOKENIZERS}


def _component(name: str, lazy: Collection[str], folder: Path, weights: Sequence[Path], dtype: torch.dtype,
               load: Callable[[], Any], seed: int | None = None) -> Any:
    """Return `load()`; or a Deferred of it, if `lazy` has `name` and its files can be named.

    Args:
        folder: with its config.json, itself or in a folder `name`. weights: its files; [] with a `seed`.
    """
    config = folder / name / 'config.json' if (folder / name).is_dir() else folder / 'config.json'
    if name not in lazy or not config.is_file() or not weights and seed is None:
        return load()  # which says what is missing
    skeleton: Any = empty_model(name, folder)
    num_bytes = sum(parameter.numel() for parameter in skeleton.parameters()) * dtype.itemsize
    return Deferred(name, skeleton.config, dtype, load, Source(config, tuple(weights), seed), num_bytes, skeleton)


def _check_sdxl(unet: nn.Module, source: str) -> None:
    """Check that a UNet has SDXL's size and crop conditioning.

    Raises:
        UserError: it is of another architecture, e.g. SD 1.5.
    """
    kind = unet.config.addition_embed_type  # type: ignore[union-attr]
    if kind != 'text_time':
        width = unet.config.cross_attention_dim  # type: ignore[union-attr]
        raise UserError(f"'{source}' is not an SDXL: its UNet has addition_embed_type={kind!r} (SDXL: 'text_time') "
                        f'and cross_attention_dim={width}. Stable Diffusion 1.x and 2.x cannot be used as a base.')


def _check_widths(parts: Mapping[str, Any], source: str) -> None:
    """Check that the UNet's cross-attention has the width of the text encoders' outputs.

    Raises:
        UserError: both widths.
    """
    encoders = [parts[name] for name in ('text_encoder', 'text_encoder_2') if parts.get(name) is not None]
    output, expected = sum(e.config.hidden_size for e in encoders), parts['unet'].config.cross_attention_dim
    if output != expected:
        raise UserError(f"The UNet of '{source}' expects text of width {expected}; the text encoders output {output}.")


def _check_tokenizers(parts: Mapping[str, Any], source: str) -> None:
    """Check that each text encoder can read what its tokenizer gives.

    Raises:
        UserError: more tokens, or longer prompts, than the encoder has.
    """
    for name, part in zip(TOKENIZERS, ('text_encoder', 'text_encoder_2'), strict=True):
        tokenizer, encoder = parts.get(name), parts.get(part)
        if tokenizer is None or encoder is None:
            continue
        positions, words = encoder.config.max_position_embeddings, encoder.config.vocab_size
        length = tokenizer.model_max_length
        if isinstance(length, bool) or not isinstance(length, int) or not 2 < length <= positions:
            raise UserError(f"The {name} of '{source}' has model_max_length={length!r}; its text encoder reads 3 to "
                            f'{positions} tokens.')
        if len(tokenizer) > words or tokenizer.pad_token_id is None:
            raise UserError(f"The {name} of '{source}' has {len(tokenizer)} tokens and the padding "
                            f'{tokenizer.pad_token!r}; its text encoder knows {words} tokens, and needs a padding.')


def _check_vae(vae: nn.Module, unet: nn.Module, source: str) -> None:
    """Check that a VAE's latents have the UNet's number of channels.

    Raises:
        UserError: both numbers.
    """
    latents, expected = vae.config.latent_channels, unet.config.out_channels  # type: ignore[union-attr]
    if latents != expected:
        raise UserError(f"The VAE '{source}' has {latents} latent channels; the UNet expects {expected}.")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new floating-point tensors are of `dtype`."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _random_components(folder: Path, dtypes: Mapping[str, torch.dtype], seed: int, skip: set[str],
                       lazy: Collection[str]) -> dict[str, Any]:
    def build(name: str) -> nn.Module:
        # Made in their own dtype: in fp32 the full UNet would take 10 GB.
        with rng.fork(seed, 'base', name), _default_dtype(dtypes[name]):
            return build_module(name, folder, name)

    index = read_index(folder)
    parts: dict[str, Any] = {'null_prompt': _null_prompt(index), 'scheduler': _scheduler_config(folder, str(folder))}
    for name in MODULES:
        if name not in skip and has_component(index, name):
            parts[name] = _component(name, lazy, folder, (), dtypes[name], partial(build, name), seed)
    return parts | {name: _load_tokenizer(name, folder, str(folder))
                    for name in TOKENIZERS if has_component(index, name)}


def _file_components(source: str, config: str | None, dtypes: Mapping[str, torch.dtype], skip: set[str],
                     revision: str | None, cache_dir: str | None, lazy: Collection[str]) -> dict[str, Any]:
    def load(skipped: Collection[str]) -> dict[str, Any]:
        return load_single_file(source, config=config, dtypes=dtypes, skip=skipped, revision=revision,
                                cache_dir=cache_dir)

    def load_part(name: str) -> Any:
        return load({*MODULES} - {name})[name]

    parts = load({*skip, *lazy})
    index, folder = parts.pop('index'), parts.pop('folder')
    for name in {*lazy} - skip:
        if has_component(index, name):
            path = resolve_file(source, revision, cache_dir)
            parts[name] = _component(name, lazy, config_folder(name, folder), [path], dtypes[name],
                                     partial(load_part, name))
    return {**parts, 'scheduler': dict(parts['scheduler'].config), 'null_prompt': _null_prompt(index)}


def _base_folder(source: str, skip: set[str], revision: str | None, variant: str | None,
                 cache_dir: str | None) -> Path:
    """Return the folder of a base; download what is needed of one on the hub."""
    if (path := hub.local_path(source)) is not None:
        return path
    repo = hub.Repo(source, revision, cache_dir)
    if 'model_index.json' not in repo.names:
        raise UserError(f"{repo} has no model_index.json, so it is not a base in diffusers' layout. To load a single "
                        f"file of it, give '{source}/<file>.safetensors'.")
    index = read_index(repo.fetch(['model_index.json']))
    names = ['model_index.json', *repo.tokenizer_files('scheduler')]
    for name in (n for n in (*MODULES, *TOKENIZERS) if n not in skip and has_component(index, n)):
        if repo.files_in(name):  # a missing folder is reported when the base is loaded
            names += repo.model_files(name, variant) if name in MODULES else repo.tokenizer_files(name)
    return repo.fetch(names)


def _tokenizer_folder(source: str, cache_dir: str | None) -> Path:
    """Return a folder with both tokenizers' folders, downloaded if `source` is a hub id."""
    path, names = hub.local_path(source), []
    repo = hub.Repo(source, cache_dir=cache_dir) if path is None else None
    for name in TOKENIZERS:
        files = repo.tokenizer_files(name) if repo else []
        if not files and (path is None or not (path / name).is_dir()):
            raise UserError(f"'{source}' has no folder '{name}'. `tokenizer` takes a folder or hub id with "
                            f"{' and '.join(map(repr, TOKENIZERS))}, like a base.")
        names += files
    return repo.fetch(names) if repo else Path(str(path))


def _load_tokenizer(name: str, folder: Path, shown: str) -> Any:
    check_files(folder / name)
    return as_user_error(shown, module_class(name).from_pretrained, str(folder), subfolder=name)


def _folder_components(folder: Path, shown: str, dtypes: Mapping[str, torch.dtype], skip: set[str],
                       variant: str | None, lazy: Collection[str]) -> dict[str, Any]:
    """Load the components of a base in a folder, which errors call `shown`."""
    index = read_index(folder, shown)
    parts: dict[str, Any] = {'null_prompt': _null_prompt(index)}
    for name in (n for n in (*MODULES, *TOKENIZERS) if n not in skip and has_component(index, n)):
        if not (folder / name).is_dir():
            raise UserError(f"'{shown}' has no folder '{name}', but its model_index.json names one.")
        if name in MODULES:
            load = partial(load_pretrained, module_class(name), str(folder), dtype=dtypes[name], subfolder=name,
                           variant=variant, shown=shown)
            parts[name] = _component(name, lazy, folder, _weights(folder / name, variant), dtypes[name], load)
        else:
            parts[name] = _load_tokenizer(name, folder, shown)
    for name in ('unet', 'text_encoder_2', 'tokenizer_2'):
        if name not in parts and name not in skip:
            raise UserError(f"'{shown}' has no '{name}', so it is not an SDXL base "
                            f'(it has {", ".join(sorted(k for k in index if not k.startswith("_")))}).')
    return {**parts, 'scheduler': _scheduler_config(folder, shown)}


def _weights(folder: Path, variant: str | None) -> list[Path]:
    return [folder / name for name in weight_files(os.listdir(folder), variant)]


def _load_other(name: str, source: str, config: str | None, dtype: torch.dtype, cache_dir: str | None,
                variant: str | None, lazy: Collection[str] = ()) -> Any:
    """Load a UNet or VAE from another source than the base, in `variant` if it has no plain weights."""
    load: Callable[[], Any]
    if is_single_file(source):
        load = partial(load_single_part, name, source, config=config, dtype=dtype, cache_dir=cache_dir)
        return _component(name, lazy, Path(config or SDXL_FILES), [resolve_file(source, cache_dir=cache_dir)], dtype,
                          load)
    path = hub.local_path(source)
    if path is None:
        repo = hub.Repo(source, cache_dir=cache_dir)
        subfolder = name if 'config.json' not in repo.names and repo.files_in(name) else None
        variant = _choose_variant(source, subfolder, list(repo.files_in(subfolder)), variant)
        path = repo.fetch(repo.model_files(subfolder, variant))
    else:
        subfolder = name if not (path / 'config.json').is_file() and (path / name).is_dir() else None
        folder = path / (subfolder or '')
        variant = _choose_variant(source, subfolder, os.listdir(folder) if folder.is_dir() else [], variant)
    load = partial(load_pretrained, module_class(name), str(path), dtype=dtype, subfolder=subfolder, variant=variant,
                   shown=source)
    folder = path / (subfolder or '')
    return _component(name, lazy, folder, _weights(folder, variant) if folder.is_dir() else [], dtype, load)


def _choose_variant(source: str, subfolder: str | None, names: Sequence[str], preferred: str | None) -> str | None:
    """Return None if there are plain weights or none at all, else the preferred variant or the only one.

    Raises:
        UserError: there are several variants, none of which is preferred.
    """
    available = [] if weight_files(names) else [v for v in variants(names) if weight_files(names, v)]
    if not available:
        return None
    if preferred not in available and len(available) > 1:
        file = '/'.join(part for part in (source, subfolder, weight_files(names, available[0])[0]) if part)
        raise UserError(f"'{source}' has its weights in the variants {', '.join(available)} only; give the file of "
                        f"one, e.g. '{file}'.")
    variant = preferred if preferred in available else available[0]
    print_log(f"'{source}' has no plain weights; its variant '{variant}' is loaded.", logger='current')
    return variant


def _null_prompt(index: Mapping[str, Any]) -> str:
    """Return what stands for an absent prompt: zeros in SDXL's base, the empty prompt in the refiner."""
    return 'zeros' if index.get('force_zeros_for_empty_prompt', True) else 'empty'


def _scheduler_config(folder: Path, shown: str) -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler
    if (path := folder / 'scheduler' / 'scheduler_config.json').is_file():
        check_scheduler(read_json(path), f'{shown}/scheduler')
    config = as_user_error(shown, EulerDiscreteScheduler.load_config, str(folder), subfolder='scheduler')
    return {k: v for k, v in dict(config).items() if not k.startswith('_')}
