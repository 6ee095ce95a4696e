"""Read the settings embedded in a PNG and validate them: the file may come from anyone."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffengine_sdxl import limits
from diffengine_sdxl.commands.infer.bounds import check_bounds, check_pixels
from diffengine_sdxl.commands.infer.digests import sha256
from diffengine_sdxl.commands.infer.provenance import (
    CONFIG,
    FORMAT,
    KEY,
    PINNED,
    cached_commit,
    config_sources,
    is_local,
    named_sources,
    request_inputs,
)
from diffengine_sdxl.commands.infer.untrusted_modules import find_modules, import_modules, known_types, types_in
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.images import png_text
from diffengine_sdxl.loading.hub import COMMIT
from diffengine_sdxl.loading.strict import shipped
from diffengine_sdxl.request import Request

#: Limit on the characters of settings that an error quotes.
MAX_QUOTED = 500


def read_png(path: str | Path) -> dict[str, Any]:
    """Return the validated settings in a PNG; nothing in them is run, and no pixel is decoded.

    Raises:
        UserError: the file is not a whole PNG, or its settings are missing, of another format, or invalid.
    """
    text = png_text(path, KEY, limits.CURRENT.png_bytes)
    if text is None:
        raise UserError(f"'{path}' holds no settings: it was not made by diffengine_sdxl, or another program removed "
                        'them.')
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4300 digits
        raise UserError(f"The settings in '{path}' are damaged: {error}.") from error
    version = settings.get('format') if isinstance(settings, dict) else None
    if version != FORMAT:
        name = str(version)[:MAX_QUOTED] if isinstance(version, int | None) else f'<{type(version).__name__}>'
        raise UserError(f"The settings in '{path}' are of format {name}; this version reads {FORMAT}.")
    try:
        check_form(settings)
    except UserError as error:
        raise UserError(f"The settings in '{path}' are invalid: {str(error)[:MAX_QUOTED]}") from error
    return settings  # type: ignore[no-any-return]


def check_image_size(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Refuse a PNG whose settings ask for another size than it has: they are not its own.

    Raises:
        UserError: names both sizes.
    """
    with open(path, 'rb') as file:
        head = file.read(24)
    if len(head) < 24 or head[12:16] != b'IHDR':  # PNG specification, 5.6: it comes first
        raise UserError(f"'{path}' is not a whole PNG.")
    width, height = (int.from_bytes(head[i:i + 4], 'big') for i in (16, 20))
    request = settings['request']
    # An image with a repainted crop keeps its own size.
    wanted = (None, None) if request.get('padding_mask_crop') is not None else (request.get('height'),
                                                                               request.get('width'))
    if wanted[0] not in (None, height) or wanted[1] not in (None, width):
        raise UserError(f"'{path}' has {height} x {width} pixels, and its settings ask for {wanted[0] or height} x "
                        f'{wanted[1] or width}: it was resized, or they are not its own. Make it from its config.')


def check_unchanged(settings: Mapping[str, Any]) -> list[str]:
    """Refuse inputs that differ from those that the image was made of; return the keys that could not be checked.

    These are URLs, hub ids and links, whose content may have changed. Modules of the user's own that the image was made
    with are imported last, when all else is as it was.

    Args:
        settings: as `read_png` returns them.

    Raises:
        UserError: a file is missing or has another SHA-256, or an input was not a file; names all keys. Or the config
            names what it must not (see `check_types`).
    """
    modules = check_types(settings['config'], settings.get('modules') or ())
    _check_weights(settings)
    recorded = {entry['key']: entry for name in ('inputs', 'sources') for entry in settings[name]}
    faults, unchecked = [], []
    # What the request and the config name is loaded; the recorded list may be forged.
    for key, path in [*((key, path) for key, path, _ in request_inputs(Request.of(settings['request']))),
                      *((key, path) for key, path, _ in config_sources(settings['config'], settings.get('weights')))]:
        before = recorded.get(key, {})
        if before.get('sha256') and before.get('path') is None:
            faults.append(f'{key} was in memory, not in a file')
        elif path is None or before.get('path') != path:
            faults.append(f"{key} is '{path}', and the image was made of '{before.get('path')}'")
        elif before.get('sha256') is None and is_local(path):  # `record` always writes it
            faults.append(f"{key} ('{path}') has no SHA-256")
        elif before.get('sha256') is None:
            unchecked.append(key)
        elif not os.path.exists(str(shipped(path))):
            faults.append(f"{key} ('{path}') is missing")
        elif (digest := sha256(str(shipped(path)))) != before['sha256']:
            faults.append(f"{key} ('{path}') has changed (SHA-256 {digest[:12]}, was {before['sha256'][:12]})")
    if faults:
        raise UserError(f'The image cannot be made again: {"; ".join(faults)}.')
    import_modules(modules)
    return unchecked


def pin(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the config with hub ids at their recorded commits, as `revision`; and notes on those that have moved.

    Args:
        settings: as `read_png` returns and `check_unchanged` accepts them.

    Raises:
        UserError: one has moved and takes no revision (a VAE, tokenizers, an image encoder); see `refuse_moved`.
    """
    config, notes = copy.deepcopy(settings['config']), []
    recorded = {entry['key']: entry for entry in settings['sources'] if entry.get('commit')}
    for part in ('model', 'refiner'):
        for holder, key, name in named_sources(part, config.get(part) or {}):
            if name in recorded and key in PINNED:
                entry, holder['revision'] = recorded[name], recorded[name]['commit']
                if (commit := cached_commit(entry, config, prefer_loaded=False)) not in (None, entry['commit']):
                    notes.append(f"{name}: '{entry['path']}' has moved on the hub, to {commit[:12]}; using "
                                 f"{entry['commit'][:12]}, as the image did.")
    refuse_moved(settings, config, loaded=False)
    return config, notes


def refuse_moved(settings: Mapping[str, Any], config: Mapping[str, Any], loaded: bool) -> None:
    """Refuse a hub source that is at another commit than the image was made of, as far as the local cache tells.

    Args:
        settings: of that image.
        config: names the `cache_dir`.
        loaded: whether this process has loaded the sources already.

    Raises:
        UserError: names all keys.
    """
    faults = [f"{entry['key']} ('{entry['path']}') has moved on the hub (commit {commit[:12]}, was "
              f"{entry['commit'][:12]})"
              for entry in settings['sources'] if entry.get('commit') and entry['key'].split('.')[-1] not in PINNED
              and (commit := cached_commit(entry, config, loaded)) not in (None, entry['commit'])]
    if faults:
        raise UserError(f"The image cannot be made again: {'; '.join(faults)}. Download that commit into a folder, and "
                        'name it in the config.')


def _check_weights(settings: Mapping[str, Any]) -> None:
    """Refuse models and adapters of this package that name no weights: SDXL would be built from nothing, with 14 GB.

    Raises:
        UserError: names the key that is missing.
    """
    for part in ('model', 'refiner'):
        section = settings['config'].get(part) or {}
        keys = [] if section.get('type') != 'SDXL' or section.get('pretrained') else [f'{part}.pretrained']
        if settings.get('weights') is None:  # else they are in that file
            keys += [f'{part}.adapters.{name}.weights' for name, adapter in (section.get('adapters') or {}).items()
                     if adapter and not adapter.get('weights') and adapter.get('type') in known_types()]
        if keys:
            raise UserError(f"The config in the PNG sets no {keys[0]}, and random weights make no image again.")


def check_types(config: Mapping[str, Any],
                recorded: Sequence[Mapping[str, Any]] = ()) -> dict[str, tuple[Path, set[str]]]:
    """Refuse a config from a PNG that names any type but those of this package and of the recorded modules.

    mmengine's registries import whatever module a `type` or a `_scope_` names.

    Returns:
        What `find_modules` found.

    Raises:
        UserError: names the key, or the module.
    """
    if unknown := [key for key in config if key not in CONFIG]:
        raise UserError(f"The config in a PNG must not set '{unknown[0]}'; it may set {', '.join(CONFIG)}.")
    modules = find_modules(recorded)
    _check_types(config, '', known_types().union(*(types for _, types in modules.values())))
    named = set(types_in(config))
    for name, (path, types) in modules.items():
        if not types & named:  # nor would it be imported for nothing
            raise UserError(f"'{path}' registers no type that the config in the PNG names, so it was not made with "
                            f"'{name}'.")
    return modules


def _check_types(node: Any, path: str, known: set[str]) -> None:
    for key, value in _items(node):
        place = f'{path}.{key}' if path else str(key)
        if str(key).startswith('_') or key in ('custom_imports', 'cache_dir'):
            raise UserError(f"The config in a PNG must not set '{place}'.")
        if key == 'type':
            # A registry would import a module for any unknown name. A scheduler is one of diffusers'.
            plain = isinstance(value, str) and value.isidentifier()
            scheduler = plain and path.endswith('.scheduler') and value.endswith('Scheduler')
            if not (plain and value in known or scheduler):
                raise UserError(f'{place}={value!r} is not a type of diffengine_sdxl, and a PNG must not name others; '
                                'make the image again from its config.')
        _check_types(value, place, known)


def check_form(settings: Mapping[str, Any]) -> None:
    """Refuse settings that lack a part, or in which a part has another type than in `provenance.record`.

    Raises:
        UserError: names the part.
    """
    check_bounds({key: value for key, value in settings.items() if key != 'made'}, 'a PNG')  # that is only shown
    config = settings.get('config')
    parts: list[tuple[str, Any, type, bool]] = [  # place, value, type, required
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
    parts.append(('modules', settings.get('modules'), list, False))
    for i, entry in _items(settings.get('modules')):
        parts += [(f'modules.{i}.{k}', _at(entry, k), str, True) for k in ('name', 'sha256')]
    for name in ('inputs', 'sources'):
        parts.append((name, settings.get(name), list, True))
        for i, entry in _items(settings.get(name)):
            whole = isinstance(entry, dict) and {'key', 'path', 'sha256'} <= entry.keys()
            parts += [(f'{name}.{i}', entry if whole else None, dict, True)]
            parts += [(f'{name}.{i}.{k}', _at(entry, k), str, k == 'key')
                      for k in ('key', 'path', 'sha256', 'revision', 'commit')]
    for place, value, kind, required in parts:
        if not isinstance(value, kind) and (required or value is not None):
            raise UserError(f"'{place}' must be a {kind.__name__}.")
    for i, entry in enumerate(settings['sources']):
        if not COMMIT.fullmatch(entry.get('commit') or '0' * 40):
            raise UserError(f"'sources.{i}.commit' is not a commit.")
    check_pixels(Request.of(settings['request']), 'a PNG')


def _items(node: Any) -> list[tuple[Any, Any]]:
    return list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())


def _at(node: Any, key: str) -> Any:
    return node.get(key) if isinstance(node, dict) else None
