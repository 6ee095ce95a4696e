"""Record in a PNG how it was made, so that the image can be made again.

The settings are one JSON object in an iTXt chunk 'diffengine_sdxl': `format` (of this object), `request` (as
`Request.of` takes it), `config` (its sections of CONFIG), `weights` (what was loaded in place of those that the config
names), `inputs` and `sources` (files by path and SHA-256), `modules` (the user's own, by name and SHA-256), and `made`
(versions, time: nothing to compare). A second chunk, 'parameters', is for people and other tools. `untrusted` reads
and checks the settings.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffengine_sdxl import atomic_files, limits
from diffengine_sdxl.commands.infer.digests import in_memory, sha256
from diffengine_sdxl.commands.infer.untrusted_modules import modules_of
from diffengine_sdxl.config.references import to_plain
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading import hub
from diffengine_sdxl.loading.strict import SHIPPED, shipped
from diffengine_sdxl.loading.trained import NONE, WEIGHTS, resolve_checkpoint
from diffengine_sdxl.request import OPTIONS, ROWS, Request

FORMAT = 1
KEY = 'diffengine_sdxl'
#: Sections of a config that determine an image.
CONFIG = ('model', 'refiner', 'infer_cfg', 'randomness', 'speed')
#: Keys of a model that change no image.
IGNORED = ('cache_dir', 'objective', 'gradient_checkpointing')
#: Settings of a Request that may name files.
FILES = (*ROWS, 'conditions')
#: Keys of a model, and of an adapter, that name a file, a folder or a hub id; with those that locate it in a folder.
SOURCES = ('pretrained', 'unet', 'vae', 'config', 'tokenizer')
ADAPTER_SOURCES = {'weights': ('subfolder', 'weight_name'), 'image_encoder': ('image_encoder_subfolder',)}
#: Keys whose hub id the `revision` beside them belongs to; a VAE of another repository has none.
PINNED = ('pretrained', 'weights')


def record(request: Request, config: Mapping[str, Any], weights: str | Path | None = None,
           made: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings of one image, for `write_png`. Paths become absolute.

    Args:
        request: of this image only, including the config's `infer_cfg`.
        config: resolved; its sections of CONFIG are recorded.
        weights: see `loading.trained.apply_weights`.
        made: versions, seconds, device.

    Raises:
        UserError: a file is missing.
    """
    assert request.num_images_per_prompt == 1, 'each image has settings of its own'
    plain = to_plain({section: config[section] for section in CONFIG if config.get(section) is not None})
    for part in {'model', 'refiner'} & plain.keys():
        plain[part] = {key: value for key, value in plain[part].items() if key not in IGNORED}
        for holder, key, _ in named_sources(part, plain[part]):
            holder[key] = _absolute_source(holder[key])
    if 'infer_cfg' in plain:  # the request has the rest
        plain['infer_cfg'] = {key: value for key, value in plain['infer_cfg'].items() if key in OPTIONS}
    settings = {'format': FORMAT, 'request': _plain_request(request), 'config': plain, 'inputs': inputs(request)}
    if weights is not None and str(weights) != WEIGHTS:
        settings['weights'] = NONE if str(weights) == NONE else os.path.abspath(resolve_checkpoint(str(weights)))
    if modules := modules_of(plain):
        settings['modules'] = modules
    return {**settings, 'sources': sources(plain, settings.get('weights')), 'made': to_plain(dict(made or {}))}


def _plain_request(request: Request) -> dict[str, Any]:
    """Return what differs from the defaults, for JSON; an image in memory as the name of its type."""
    def plain(value: Any, is_path: bool) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(part, is_path) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part, is_path) for part in value]
        if is_path and isinstance(value, str | os.PathLike):
            return _absolute_input(value)
        return value if isinstance(value, str | int | float | bool | None) else f'<{type(value).__name__}>'

    settings = {'prompt': request.prompt, 'seed': request.seed}
    for field in fields(Request):
        value = getattr(request, field.name)
        if not (value is field.default or isinstance(value, str | int | float | tuple | Mapping)
                and value in (field.default, {})):
            settings[field.name] = plain(value, field.name in FILES)
    return settings


def _absolute_input(value: str | os.PathLike[str]) -> str:
    from diffengine_sdxl.datasets.image_files import is_url
    return str(value) if is_url(str(value)) else os.path.abspath(value)


def _absolute_source(source: str) -> str:
    """Return an absolute path; hub ids, links and what the package ships stay as they are."""
    path = os.path.expanduser(source)
    local = os.path.exists(path) or source.startswith(('.', '~', '/'))
    return os.path.abspath(path) if local and not source.startswith(SHIPPED) else source


def inputs(request: Request) -> list[dict[str, Any]]:
    """Return the images and tensors that a request names: `key` ('conditions.depth'), absolute `path`, `sha256`.

    A URL has no SHA-256 (it would have to be fetched twice), so it is not checked. An object in memory has no path, so
    that image cannot be made again.

    Raises:
        UserError: a file is missing; names its key.
    """
    entries = []
    for key, path, value in request_inputs(request):
        if path and os.path.isdir(path):
            raise UserError(f"{key}: '{path}' is a folder; name a file in it.")
        entries.append({'key': key, 'path': path, 'sha256': _digest(key, path) if path else in_memory(value)})
    return entries


def sources(config: Mapping[str, Any], weights: str | None = None) -> list[dict[str, Any]]:
    """Return what a model and its refiner are loaded from: `key` ('model.adapters.style.weights'), `path`, `sha256`.

    Hub ids and links have no SHA-256, but their `revision`.

    Args:
        config: its sections `model` and `refiner` are read.
        weights: see `record`; a path.

    Raises:
        UserError: a file is missing; names its key.
    """
    return [{'key': key, 'path': path, 'sha256': _digest(key, path),
             **({} if is_local(path) else {'revision': revision})}
            for key, path, revision in config_sources(config, weights)]


def is_local(path: str) -> bool:
    """Return whether a source of `config_sources` is a file or folder of this machine."""
    return os.path.isabs(path) or path.startswith(SHIPPED)


def _digest(key: str, path: str) -> str | None:
    """Return the SHA-256 of a local path or of what the package ships; None for a hub id or URL."""
    try:
        return sha256(str(shipped(path))) if is_local(path) else None
    except UserError as error:
        raise UserError(f'{key}: {error}') from error


def request_inputs(request: Request) -> Iterator[tuple[str, str | None, Any]]:
    """Yield key, absolute path (None in memory) and value of each input of a request."""
    def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping | list | tuple):
            for name, part in value.items() if isinstance(value, Mapping) else enumerate(value):
                yield from leaves(f'{key}.{name}', part)
        elif value is not None:
            yield key, value

    for field in FILES:
        for key, value in leaves(field, getattr(request, field)):
            yield key, _absolute_input(value) if isinstance(value, str | os.PathLike) else None, value


def config_sources(config: Mapping[str, Any], weights: str | None) -> Iterator[tuple[str, str, str | None]]:
    """Yield key, absolute path (or hub id) and revision of each source of a config."""
    for part in ('model', 'refiner'):
        for holder, key, name in named_sources(part, config.get(part) or {}):
            path = _absolute_source(holder[key])
            if os.path.isdir(path):
                path = os.path.join(path, *(str(holder[k]) for k in ADAPTER_SOURCES.get(key, ()) if holder.get(k)))
            yield name, path, holder.get('revision') if key in PINNED else None
    if weights is not None and weights != NONE:
        yield 'weights', weights, None


def named_sources(part: str, section: Mapping[str, Any]) -> Iterator[tuple[Any, Any, str]]:
    """Yield each source of a model: the dict or list that holds it, its place there, and its key in the config."""
    for key in SOURCES:
        if isinstance(section.get(key), str):
            yield section, key, f'{part}.{key}'
    for name, adapter in (section.get('adapters') or {}).items():
        for key in ADAPTER_SOURCES:
            value = adapter.get(key) if isinstance(adapter, Mapping) else None
            if isinstance(value, str):
                yield adapter, key, f'{part}.adapters.{name}.{key}'
            for i, one in enumerate(value if isinstance(value, list) else ()):  # a textual inversion in two files
                if isinstance(one, str):
                    yield value, i, f'{part}.adapters.{name}.{key}.{i}'


def add_commits(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` with the `commit` of each hub id among its `sources`, from the hub's local cache.

    Args:
        config: whose models were loaded; names their `cache_dir`.
    """
    entries = []
    for entry in settings['sources']:
        commit = cached_commit(entry, config, prefer_loaded=True) if entry['sha256'] is None else None
        entries.append({**entry, **({} if commit is None else {'commit': commit})})
    return {**settings, 'sources': entries}


def cached_commit(entry: Mapping[str, Any], config: Mapping[str, Any], prefer_loaded: bool) -> str | None:
    """Return the commit of one of `sources`, see `hub.commit_in_cache`."""
    part, _, rest = entry['key'].partition('.')
    # Adapters are loaded from the hub's own cache.
    cache_dir = None if rest.startswith('adapters.') else (config.get(part) or {}).get('cache_dir')
    return hub.commit_in_cache(entry['path'] or '', entry.get('revision'), cache_dir, prefer_loaded)


def write_png(image: Image.Image, path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write `image` with its settings, whole or not at all.

    Args:
        settings: see `record`.

    Raises:
        UserError: the disk is full, or the settings are too long to be read again.
    """
    # In ASCII, as a lone surrogate, which a command line may hold, has no other encoding.
    text = json.dumps({**settings, 'format': FORMAT})
    if len(text) > (most := limits.CURRENT.png_bytes):
        raise UserError(f"The settings of '{path}' have {len(text)} bytes; at most {most} are read again "
                        '(limits.png_bytes).')
    chunks = PngInfo()
    chunks.add_text('parameters', parameters(settings, image.size).encode('utf-8', 'replace').decode())
    chunks.add_itxt(KEY, text)
    with atomic_files.replacing(Path(path)) as temporary:
        image.save(temporary, format='PNG', pnginfo=chunks)


def effective(settings: Mapping[str, Any], key: str) -> Any:
    """Return the request's `key`, or that of the config's sampler if the request leaves it out."""
    sampler = settings['config']['model'].get('sampler') or {}
    value = settings['request'].get(key)
    if value is None and key == 'guidance_scale':
        return next((g.get('scale') for g in sampler.get('guidances') or () if g.get('type') == 'CFG'), None)
    return sampler.get(key) if value is None else value


def parameters(settings: Mapping[str, Any], size: tuple[int, int]) -> str:
    """Return the settings for people and tools, in the form of AUTOMATIC1111's web UI.

    Args:
        size: width and height of the image.
    """
    request, model = settings['request'], settings['config']['model']
    values = {'Steps': effective(settings, 'num_inference_steps'),
              'Sampler': ((model.get('sampler') or {}).get('scheduler') or {}).get('type'),
              'CFG scale': effective(settings, 'guidance_scale'), 'Seed': request.get('seed'),
              'Size': f'{size[0]}x{size[1]}', 'Model': Path(str(model.get('pretrained') or '')).name or None,
              'UNet': Path(str(model.get('unet') or '')).name or None,
              'Denoising strength': request.get('strength'), 'Version': KEY}
    lines = [str(request.get('prompt', ''))]
    if request.get('negative_prompt'):
        lines.append(f'Negative prompt: {request["negative_prompt"]}')
    quoted = {key: json.dumps(value) if re.search('[,:\n"]', str(value)) else value for key, value in values.items()}
    return '\n'.join([*lines, ', '.join(f'{key}: {value}' for key, value in quoted.items() if value is not None)])
