"""What a PNG says of itself, so that the same picture can be made again: settings, and its inputs by their SHA-256.

The settings are one JSON object in an iTXt chunk 'diffengine_sdxl': `format` (of this object), `request` (as
`Request.of` takes it), `config` (its sections of CONFIG), `weights` (what was loaded in place of those that the config
names), `inputs` and `sources` (files by path and SHA-256), and `made` (versions, time: what is no setting). A second
chunk, 'parameters', is for people and other tools.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffengine_sdxl import hub
from diffengine_sdxl.datasets.images import is_url
from diffengine_sdxl.engine import checkpoint
from diffengine_sdxl.engine.config import to_plain
from diffengine_sdxl.engine.inference.digests import in_memory, sha256
from diffengine_sdxl.engine.inference.request import OPTIONS, Request
from diffengine_sdxl.engine.inference.strangers import CONFIG, check_form, check_types
from diffengine_sdxl.engine.tested import NONE, WEIGHTS, find
from diffengine_sdxl.pictures import png_text
from diffengine_sdxl.weights import SHIPPED, shipped

FORMAT = 1
KEY = 'diffengine_sdxl'
#: Bytes of settings in a picture, and letters of what an error repeats of them, at most.
MOST, SAID = 4 * 2**20, 500
#: Of a model, what changes no picture.
FREE = ('cache_dir', 'objective', 'gradient_checkpointing')
#: Fields of a Request that may name files.
FILES = ('image', 'mask_image', 'conditions', 'latents')
#: Keys of a model and of an adapter that name a file, a folder or a hub's id; with those that say where in a folder.
SOURCES = ('pretrained', 'unet', 'vae', 'config', 'tokenizer')
#: Of these, those that the `revision` beside them belongs to; a VAE of another repository has its own.
PINNED = ('pretrained', 'weights')
ADAPTER_SOURCES = {'weights': ('subfolder', 'weight_name'), 'image_encoder': ('image_encoder_subfolder',)}


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
    path = os.path.expanduser(source)
    local = os.path.exists(path) or source.startswith(('.', '~', '/'))
    return os.path.abspath(path) if local and not source.startswith(SHIPPED) else source


def inputs(request: Request) -> list[dict[str, Any]]:
    """The pictures and tensors that a request brings: `key` ('conditions.depth'), absolute `path`, `sha256`.

    An http(s) address has no SHA-256 (it would have to be fetched twice), so it is not checked. What lies in memory has
    no path: such a picture cannot be made again.

    Raises:
        ValueError: a file is missing, by its key.
    """
    found = []
    for key, path, value in _inputs(request):
        if path and os.path.isdir(path):
            raise ValueError(f"{key}: '{path}' is a folder; name a file in it.")
        found.append({'key': key, 'path': path, 'sha256': _digest(key, path) if path else in_memory(value)})
    return found


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
            yield name, path, holder.get('revision') if key in PINNED else None
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


def with_commits(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the `commit` of each hub id among its `sources`, as the hub's local cache tells it.

    Args:
        config: whose models were loaded; its `cache_dir` is looked into.
    """
    told = []
    for entry in settings['sources']:
        commit = _commit_now(entry, config, taken=True) if entry['sha256'] is None else None
        told.append({**entry, **({} if commit is None else {'commit': commit})})
    return {**settings, 'sources': told}


def _commit_now(entry: Mapping[str, Any], config: Mapping[str, Any], taken: bool) -> str | None:
    part, _, rest = entry['key'].partition('.')
    # Adapters come by way of the usual cache.
    cache = None if rest.startswith('adapters.') else (config.get(part) or {}).get('cache_dir')
    return hub.commit_in_cache(entry['path'] or '', entry.get('revision'), cache, taken)


def pin(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config with hub ids at the commits that they had, as their `revision`; sentences on those that have moved.

    Args:
        settings: as `read_png` gives them, and `check_unchanged` accepts them.

    Raises:
        ValueError: one has moved and takes no revision (a VAE, tokenizers, an image encoder); see `refuse_moved`.
    """
    config, words = copy.deepcopy(settings['config']), []
    known = {entry['key']: entry for entry in settings['sources'] if entry.get('commit')}
    for part in ('model', 'refiner'):
        for holder, key, name in _named(part, config.get(part) or {}):
            if name in known and key in PINNED:
                entry, holder['revision'] = known[name], known[name]['commit']
                if (now := _commit_now(entry, config, taken=False)) not in (None, entry['commit']):
                    words.append(f"{name}: '{entry['path']}' has moved on the hub, to {now[:12]}; it is taken at "
                                 f"{entry['commit'][:12]}, as the picture was made.")
    refuse_moved(settings, config, loaded=False)
    return config, words


def refuse_moved(settings: Mapping[str, Any], config: Mapping[str, Any], loaded: bool) -> None:
    """Refuse what came from the hub at another commit than the picture was made of, as far as the local cache tells.

    Args:
        settings: of that picture. config: whose `cache_dir` is looked into.
        loaded: it has been loaded in this process; else, what would be.

    Raises:
        ValueError: all of them, by their keys.
    """
    faults = [f"{entry['key']} ('{entry['path']}') has moved on the hub (commit {now[:12]}, was {entry['commit'][:12]})"
              for entry in settings['sources'] if entry.get('commit') and entry['key'].split('.')[-1] not in PINNED
              and (now := _commit_now(entry, config, loaded)) not in (None, entry['commit'])]
    if faults:
        raise ValueError(f"The picture cannot be made again: {'; '.join(faults)}. Fetch that commit into a folder, and "
                         'name it in the config.')


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
        kind = str(version)[:SAID] if isinstance(version, int | None) else f'<{type(version).__name__}>'
        raise ValueError(f"The settings in '{path}' are of format {kind}; this version reads {FORMAT}.")
    try:
        check_form(settings)
    except ValueError as error:
        raise ValueError(f"The settings in '{path}' are not as this engine writes them: {str(error)[:SAID]}") from error
    return settings  # type: ignore[no-any-return]


def check_size(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Refuse a picture whose settings ask for another size than it has: they are not its own.

    Args:
        path: of the PNG that `settings` are from.

    Raises:
        ValueError: both sizes.
    """
    with open(path, 'rb') as file:
        head = file.read(24)
    if len(head) < 24 or head[12:16] != b'IHDR':  # PNG specification, 5.6: it comes first
        raise ValueError(f"'{path}' is no whole PNG.")
    width, height = (int.from_bytes(head[i:i + 4], 'big') for i in (16, 20))
    request = settings['request']
    # What is cut out of a picture and put back has a size of its own.
    asked = (None, None) if request.get('padding_mask_crop') is not None else (request.get('height'),
                                                                              request.get('width'))
    if asked[0] not in (None, height) or asked[1] not in (None, width):
        raise ValueError(f"'{path}' has {height} x {width} pixels, and its settings ask for {asked[0] or height} x "
                         f'{asked[1] or width}: it was made larger or smaller since, or they are not its own. Make it '
                         'from its config.')


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
    request = settings['request']
    pretrained, unet = (str(settings['config']['model'].get(key) or '') for key in ('pretrained', 'unet'))
    listed = {'Steps': effective(settings, 'num_inference_steps'),
              'Sampler': (_sampler(settings).get('scheduler') or {}).get('type'),
              'CFG scale': effective(settings, 'guidance_scale'), 'Seed': request.get('seed'),
              'Size': f'{size[0]}x{size[1]}', 'Model': Path(pretrained).name or None,
              'UNet': Path(unet).name or None,
              'Denoising strength': request.get('strength'), 'Version': KEY}
    lines = [str(request.get('prompt', ''))]
    if request.get('negative_prompt'):
        lines.append(f'Negative prompt: {request["negative_prompt"]}')
    told = {key: json.dumps(value) if re.search('[,:\n"]', str(value)) else value for key, value in listed.items()}
    return '\n'.join([*lines, ', '.join(f'{key}: {value}' for key, value in told.items() if value is not None)])
