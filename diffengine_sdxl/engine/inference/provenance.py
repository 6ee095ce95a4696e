"""What a PNG says of itself, so that the same picture can be made again: settings, and its inputs by their SHA-256.

The settings are one JSON object in an iTXt chunk 'diffengine_sdxl': `format` (of this object), `request` (as
`Request.of` takes it), `config` (its sections of CONFIG), `weights` (what was loaded in place of those that the config
names), `inputs` and `sources` (files by path and SHA-256), and `made` (versions, time: what is no setting). A second
chunk, 'parameters', is for people and other tools.
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

from diffengine_sdxl import registry
from diffengine_sdxl.datasets.images import is_url
from diffengine_sdxl.engine import checkpoint
from diffengine_sdxl.engine.config import to_plain
from diffengine_sdxl.engine.inference.digests import in_memory, sha256
from diffengine_sdxl.engine.inference.request import OPTIONS, Request
from diffengine_sdxl.engine.tested import NONE, WEIGHTS, find
from diffengine_sdxl.pictures import png_text
from diffengine_sdxl.weights import SHIPPED, shipped

FORMAT = 1
KEY = 'diffengine_sdxl'
#: Bytes of settings in a picture, at most.
MOST = 4 * 2**20
#: Sections of a config that a picture may bring, and of a model what changes no picture.
CONFIG, FREE = ('model', 'refiner', 'infer_cfg', 'randomness'), ('cache_dir', 'objective', 'gradient_checkpointing')
#: Fields of a Request that may name files.
FILES = ('image', 'mask_image', 'conditions', 'latents')
#: Keys of a model and of an adapter that name a file, a folder or a hub's id; with those that say where in a folder.
SOURCES = ('pretrained', 'vae', 'config', 'tokenizer')
ADAPTER_SOURCES = {'weights': ('subfolder', 'weight_name'), 'image_encoder': ('image_encoder_subfolder',)}
REGISTRIES = (registry.MODELS, registry.ADAPTERS, registry.SAMPLERS, registry.GUIDANCES)


def record(request: Request, config: Mapping[str, Any], weights: str | Path | None = None,
           made: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of one picture, for `write_png`. Paths become absolute, so that they hold from any folder.

    Args:
        request: for this picture alone, with what the config's `infer_cfg` asks.
        config: whose sections of CONFIG made it, resolved.
        weights: see `engine.tested.weighted`.
        made: how it came about: versions, seconds, device.

    Raises:
        ValueError: a file is missing.
    """
    assert request.num_images_per_prompt == 1, 'each picture has settings of its own'
    plain = to_plain({section: config[section] for section in CONFIG if config.get(section) is not None})
    for part in {'model', 'refiner'} & plain.keys():
        plain[part] = {key: value for key, value in plain[part].items() if key not in FREE}
        for holder, key, _ in _named(part, plain[part]):
            holder[key] = _absolute(holder[key])
    if 'infer_cfg' in plain:  # the request has the rest
        plain['infer_cfg'] = {key: value for key, value in plain['infer_cfg'].items() if key in OPTIONS}
    asked = {'prompt': request.prompt, 'seed': request.seed}
    for field in fields(Request):
        value = getattr(request, field.name)
        if not (value is field.default or isinstance(value, str | int | float | tuple | Mapping)
                and value in (field.default, {})):
            asked[field.name] = _told(value, field.name in FILES)
    settings = {'format': FORMAT, 'request': asked, 'config': plain, 'inputs': inputs(request)}
    if weights is not None and str(weights) != WEIGHTS:
        settings['weights'] = NONE if str(weights) == NONE else os.path.abspath(find(str(weights)))
    return {**settings, 'sources': sources(plain, settings.get('weights')), 'made': to_plain(dict(made or {}))}


def _told(value: Any, is_path: bool) -> Any:
    """`value` for JSON; a picture or tensor in memory as the name of its kind, which stands for no file."""
    if isinstance(value, Mapping):
        return {str(key): _told(part, is_path) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_told(part, is_path) for part in value]
    if is_path and isinstance(value, str | os.PathLike):
        return _place(value)
    return value if isinstance(value, str | int | float | bool | None) else f'<{type(value).__name__}>'


def _place(value: str | os.PathLike[str]) -> str:
    return str(value) if is_url(str(value)) else os.path.abspath(value)


def _absolute(source: str) -> str:
    """A source as it holds from any folder; hub ids, links and what came with the package stay."""
    path = Path(source).expanduser()
    local = path.exists() or source.startswith(('.', '~', '/'))
    return os.path.abspath(path) if local and not source.startswith(SHIPPED) else source


def inputs(request: Request) -> list[dict[str, Any]]:
    """The pictures and tensors that a request brings: `key` ('conditions.depth'), absolute `path`, `sha256`.

    An http(s) address has no SHA-256 (it would have to be fetched twice), so it is not checked. What lies in memory has
    no path: such a picture cannot be made again.

    Raises:
        ValueError: a file is missing, by its key.
    """
    return [{'key': key, 'path': path, 'sha256': _digest(key, path) if path else in_memory(value)}
            for key, path, value in _inputs(request)]


def sources(config: Mapping[str, Any], weights: str | None = None) -> list[dict[str, Any]]:
    """The weights that a model and its refiner are made of: `key` ('model.adapters.style.weights'), `path`, `sha256`.

    Hub ids and links keep their name as `path`, have no SHA-256, and have their `revision`.

    Args:
        config: its sections `model` and `refiner` are read. weights: see `record`; a path.

    Raises:
        ValueError: a file is missing, by its key.
    """
    return [{'key': key, 'path': path, 'sha256': _digest(key, path),
             **({} if os.path.isabs(path) or path.startswith(SHIPPED) else {'revision': revision})}
            for key, path, revision in _sources(config, weights)]


def _digest(key: str, path: str) -> str | None:
    """The SHA-256 of a local path or of what came with the package; None of one elsewhere."""
    try:
        local = str(shipped(path))
        return sha256(local) if os.path.isabs(local) else None
    except ValueError as error:
        raise ValueError(f'{key}: {error}') from error


def _inputs(request: Request) -> Iterator[tuple[str, str | None, Any]]:
    for field in FILES:
        for key, value in _leaves(field, getattr(request, field)):
            yield key, _place(value) if isinstance(value, str | os.PathLike) else None, value


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | list | tuple):
        for name, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(f'{key}.{name}', part)
    elif value is not None:
        yield key, value


def _sources(config: Mapping[str, Any], weights: str | None) -> Iterator[tuple[str, str, str | None]]:
    for part in ('model', 'refiner'):
        for holder, key, name in _named(part, config.get(part) or {}):
            path = _absolute(holder[key])
            if os.path.isdir(path):
                path = os.path.join(path, *(str(holder[k]) for k in ADAPTER_SOURCES.get(key, ()) if holder.get(k)))
            # `revision` is the base's or the adapter's own; a VAE of another repository has its own.
            yield name, path, holder.get('revision') if key in ('pretrained', 'weights') else None
    if weights is not None and weights != NONE:
        yield 'weights', weights, None


def _named(part: str, section: Mapping[str, Any]) -> Iterator[tuple[Any, str, str]]:
    """The keys of a model that name a source: the dict that holds it, its key there, and its key in the config."""
    for key in SOURCES:
        if isinstance(section.get(key), str):
            yield section, key, f'{part}.{key}'
    for name, adapter in (section.get('adapters') or {}).items():
        for key in ADAPTER_SOURCES:
            if isinstance(adapter, Mapping) and isinstance(adapter.get(key), str):
                yield adapter, key, f'{part}.adapters.{name}.{key}'


def check_unchanged(settings: Mapping[str, Any]) -> list[str]:
    """Refuse to make a picture again from other inputs than it was made of; the keys that could not be checked.

    These are http(s) addresses, hub ids and links: what lies behind them may have changed.

    Args:
        settings: as `read_png` gives them.

    Raises:
        ValueError: a file is missing or has another SHA-256, or an input was no file; all of them, by their keys. Or
            the settings name what a picture must not (see `check_types`).
    """
    check_types(settings['config'])
    known = {entry['key']: entry for name in ('inputs', 'sources') for entry in settings[name]}
    faults, unchecked = [], []
    # What the request and the config name counts, not what a stranger's list of files says.
    for key, path in [*((key, path) for key, path, _ in _inputs(Request.of(settings['request']))),
                      *((key, path) for key, path, _ in _sources(settings['config'], settings.get('weights')))]:
        before = known.get(key, {})
        if before.get('sha256') and before.get('path') is None:
            faults.append(f'{key} lay in memory and was no file')
        elif path is None or before.get('path') != path:
            faults.append(f"{key} is '{path}', and the picture was made of '{before.get('path')}'")
        elif before.get('sha256') is None and (os.path.isabs(path) or path.startswith(SHIPPED)):
            # What lies here always has one; a stranger's list may leave it out.
            faults.append(f"{key} ('{path}') has no SHA-256")
        elif before.get('sha256') is None:
            unchecked.append(key)
        elif not os.path.exists(str(shipped(path))):
            faults.append(f"{key} ('{path}') is missing")
        elif (now := sha256(str(shipped(path)))) != before['sha256']:
            faults.append(f"{key} ('{path}') has changed (SHA-256 {now[:12]}, was {before['sha256'][:12]})")
    if faults:
        raise ValueError(f'The picture cannot be made again: {"; ".join(faults)}.')
    return unchecked


def check_types(config: Mapping[str, Any]) -> None:
    """Refuse a config from a picture that names anything but this package's own parts: it may be a stranger's.

    mmengine's registries import whatever module a `type` or a `_scope_` names.

    Raises:
        ValueError: the key at fault.
    """
    if unknown := [key for key in config if key not in CONFIG]:
        raise ValueError(f"The config of a picture must not bring '{unknown[0]}'; it may bring {', '.join(CONFIG)}.")
    for one in REGISTRIES:
        one.import_from_location()
    _check_types(config, '')


def _check_types(node: Any, path: str) -> None:
    for key, value in _items(node):
        place = f'{path}.{key}' if path else str(key)
        if str(key).startswith('_') or key in ('custom_imports', 'cache_dir'):
            raise ValueError(f"The config of a picture must not bring '{place}'.")
        if key == 'type':
            # Only own names: a registry would import a module of any other. A scheduler is one of diffusers'.
            plain = isinstance(value, str) and value.isidentifier()
            own = plain and any(value in one.module_dict for one in REGISTRIES)
            if not own and not (plain and path.endswith('.scheduler') and value.endswith('Scheduler')):
                raise ValueError(f"{place}={value!r} is no part of this package, and a picture must name no other; "
                                 'make it again from its config.')
        _check_types(value, place)


def write_png(image: Image.Image, path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write `image` with its settings, whole or not at all.

    Args:
        settings: see `record`.

    Raises:
        ValueError: no room to write, or more settings than are read again.
    """
    # ASCII alone: halves of surrogate pairs, which a command line may hold, cannot be written otherwise.
    text = json.dumps({**settings, 'format': FORMAT})
    if len(text) > MOST:
        raise ValueError(f"The settings of '{path}' have {len(text)} bytes; more than {MOST} would not be read again.")
    chunks = PngInfo()
    chunks.add_text('parameters', parameters(settings, image.size).encode('utf-8', 'replace').decode())
    chunks.add_itxt(KEY, text)
    with checkpoint.replacing(Path(path)) as temporary:
        image.save(temporary, format='PNG', pnginfo=chunks)


def read_png(path: str | Path) -> dict[str, Any]:
    """The settings in a picture; nothing in them is trusted or run, and no pixel is decoded.

    Raises:
        ValueError: it is no whole PNG, has no settings of ours, or those of another format.
    """
    text = png_text(path, KEY, MOST)
    if text is None:
        raise ValueError(f"'{path}' holds no settings: it was not made by this engine, or another program took them "
                         'out.')
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The settings in '{path}' are damaged: {error}.") from error
    version = settings.get('format') if isinstance(settings, dict) else None
    if version != FORMAT:
        raise ValueError(f"The settings in '{path}' are of format {version!r}; this version reads {FORMAT}.")
    try:
        _check_form(settings)
    except ValueError as error:
        raise ValueError(f"The settings in '{path}' are not as this engine writes them: {error}") from error
    return settings  # type: ignore[no-any-return]


def _check_form(settings: Mapping[str, Any]) -> None:
    """Refuse settings that lack a part, or in which a part is of another kind than `record` makes it.

    Raises:
        ValueError: names the part.
    """
    config = settings.get('config')
    parts: list[tuple[str, Any, type, bool]] = [
        ('request', settings.get('request'), dict, True), ('config', config, dict, True),
        ('made', settings.get('made'), dict, False), ('weights', settings.get('weights'), str, False)]
    for section in CONFIG:
        node = _at(config, section)
        parts.append((f'config.{section}', node, dict, section == 'model'))
        if isinstance(node, dict) and section in ('model', 'refiner'):
            adapters, sampler = node.get('adapters'), node.get('sampler')
            parts += [(f'{section}.adapters', adapters, dict, False), (f'{section}.sampler', sampler, dict, False)]
            parts += [(f'{section}.adapters.{k}', v, dict, False) for k, v in _items(adapters)]
            parts += [(f'{section}.sampler.{k}', _at(sampler, k), kind, False)
                      for k, kind in (('scheduler', dict), ('guidances', list))]
            parts += [(f'{section}.sampler.guidances.{k}', v, dict, True) for k, v in _items(_at(sampler, 'guidances'))]
    for name in ('inputs', 'sources'):
        parts.append((name, settings.get(name), list, True))
        for i, entry in _items(settings.get(name)):
            whole = isinstance(entry, dict) and {'key', 'path', 'sha256'} <= entry.keys()
            parts += [(f'{name}.{i}', entry if whole else None, dict, True)]
            parts += [(f'{name}.{i}.{k}', _at(entry, k), str, k == 'key') for k in ('key', 'path', 'sha256')]
    for place, value, kind, needed in parts:
        if not isinstance(value, kind) and (needed or value is not None):
            raise ValueError(f"'{place}' must be a {kind.__name__}.")
    Request.of(settings['request'])


def _items(node: Any) -> list[tuple[Any, Any]]:
    return list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())


def _at(node: Any, key: str) -> Any:
    return node.get(key) if isinstance(node, dict) else None


def effective(settings: Mapping[str, Any], key: str) -> Any:
    """The request's `key`; where it leaves it to the config, that of the config's sampler."""
    sampler = _sampler(settings)
    found = settings['request'].get(key)
    if found is None and key == 'guidance_scale':
        return next((g.get('scale') for g in sampler.get('guidances') or () if g.get('type') == 'CFG'), None)
    return sampler.get(key) if found is None else found


def _sampler(settings: Mapping[str, Any]) -> dict[str, Any]:
    return settings['config']['model'].get('sampler') or {}


def parameters(settings: Mapping[str, Any], size: tuple[int, int]) -> str:
    """The settings for people and tools, in the form that AUTOMATIC1111's web UI writes and others show.

    Args:
        size: width and height of the picture.
    """
    request, pretrained = settings['request'], str(settings['config']['model'].get('pretrained') or '')
    listed = {'Steps': effective(settings, 'num_inference_steps'),
              'Sampler': _at(_sampler(settings).get('scheduler'), 'type'),
              'CFG scale': effective(settings, 'guidance_scale'), 'Seed': request.get('seed'),
              'Size': f'{size[0]}x{size[1]}', 'Model': Path(pretrained).name or None,
              'Denoising strength': request.get('strength'), 'Version': KEY}
    lines = [str(request.get('prompt', ''))]
    if request.get('negative_prompt'):
        lines.append(f'Negative prompt: {request["negative_prompt"]}')
    told = {key: json.dumps(value) if re.search('[,:\n"]', str(value)) else value for key, value in listed.items()}
    return '\n'.join([*lines, ', '.join(f'{key}: {value}' for key, value in told.items() if value is not None)])
