"""Adapters of an inferencer: added to its config by name and file, loaded anew in place, scaled for one request."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from safetensors import SafetensorError, safe_open

from diffengine_sdxl.config.signatures import accepted
from diffengine_sdxl.errors import UserError, did_you_mean, error_prefix
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.models.text_encoders import check_chunks
from diffengine_sdxl.registry import ADAPTERS

#: Of training, in the headers of its exports; see `formats.modelspec`.
CAPTION_CHUNKS = 'diffengine_sdxl.caption_chunks'
#: Keys of an adapter that locate its file within `weights`.
LOCATORS = ('subfolder', 'weight_name', 'revision', 'variant')


def add_adapter(cfg: Config, name: str, settings: Mapping[str, Any]) -> None:
    """Add a frozen adapter to `cfg`, or give one of its adapters another file.

    Args:
        settings: of the adapter; `weights` is a file, folder, hub id or link. Without `type` it is that of the config's
            adapter `name`, else the one found in the file. A new adapter that reads an image reads condition `name`.

    Raises:
        UserError: the adapter's class lacks a setting, nothing tells its `weights` or its type, or the kind of the file
            is unknown.
    """
    adapters = dict_at(cfg.model, 'adapters')
    old = dict_at(adapters, name)
    given = dict(settings)
    if not isinstance(given.get('weights'), list | tuple | None):
        given['weights'] = str(given['weights'])  # a Path, or a number that names a file
    if 'type' not in given and 'type' not in old:
        if given.get('weights') is None:
            raise UserError(f"Adapter '{name}' is not in the config, so it needs `weights`: a file, folder, hub id or "
                            f'link.{did_you_mean(name, list(adapters))}')
        from diffengine_sdxl.adapters.formats.detect import adapter_settings
        found = adapter_settings(given['weights'], cfg.model.get('pretrained'),
                                 **{key: given[key] for key in (*LOCATORS, 'ignore_keys') if key in given})
        # Of a whole export, `found` has the adapter's folder in it.
        given = {**found, **given, **{key: found[key] for key in found.keys() & {'subfolder'}}}
        if found['type'] == 'TextualInversion':
            given.setdefault('token', name)
    kind = str(given.setdefault('type', old.get('type')))
    known = list(accepted(ADAPTERS.get(kind)) or ())
    if unknown := [key for key in given if key not in known and key != 'type']:
        raise UserError(f"Adapter '{name}': a {kind} has no '{unknown[0]}'.{did_you_mean(unknown[0], known)}")
    if kind == old.get('type'):
        # What locates the old file does not apply to another one.
        kept = {key: value for key, value in old.items() if key not in LOCATORS or 'weights' not in given}
        given = {**kept, 'trainable': False, **given}
    else:
        reads = {'condition_key': name} if 'condition_key' in known else {}
        given = {**reads, 'trainable': False, **given}
    cfg.model.adapters = ConfigDict({**adapters, name: given})


def use_caption_chunks(cfg: Config, weights: Path | None) -> None:
    """Let the model of `cfg` read prompts in as many chunks as the captions that its weights were trained with.

    Training writes that into the headers of its exports. Weights on the hub are not asked.

    Args:
        cfg: changed in place, unless it sets `model.caption_chunks`.
        weights: a checkpoint, or a folder in an export, that is loaded besides what `cfg` names.

    Raises:
        UserError: a header holds another number than training writes.
    """
    if cfg.model.get('caption_chunks') is not None:
        return
    # The export of a checkpoint lies beside it.
    places = [] if weights is None else [(weights.with_suffix('') if weights.is_file() else weights, '')]
    for settings in (cfg.model, *(cfg.model.get('adapters') or {}).values()):
        inner = '/'.join(str(settings[name]) for name in ('subfolder', 'weight_name')
                         if settings and settings.get(name))
        places += [(Path(source), inner) for key in ('pretrained', 'unet', 'weights')
                   if settings and isinstance(source := settings.get(key), str)]
    if (num := max((_recorded_chunks(*place) for place in places), default=1)) > 1:
        cfg.model.caption_chunks = num


def _recorded_chunks(source: Path, inner: str) -> int:
    """Return the `caption_chunks` in the header of a file, or of the first one at `inner` in a folder; 1 if none is."""
    try:
        source = source.expanduser()
        if source.is_dir():
            folder = Path(os.path.normpath(source / inner))
            files = [folder] if folder.is_file() else folder.rglob('*.safetensors')
            source = next(file for file in files if folder.is_relative_to(os.path.normpath(source)))
        with safe_open(source, framework='pt') as content:
            recorded = (content.metadata() or {}).get(CAPTION_CHUNKS, '1')
    except (SafetensorError, OSError, RuntimeError, StopIteration):  # not here, or another format: loading says so
        return 1
    with error_prefix(f"'{source}': ", unless=f"'{source}'"):
        return check_chunks(int(recorded) if re.fullmatch('[0-9]{1,4}', recorded) else recorded)


def load_adapter(model: SDXL, cfg: Config, name: str, source: str | Path) -> None:
    """Load other weights into an adapter of `model`, in place, and name them in `cfg`.

    Raises:
        UserError: there is no such adapter, or they do not fit it.
    """
    if name not in model.adapters:
        raise UserError(f"There is no adapter '{name}' to load '{source}' into; there are "
                        f'{", ".join(model.adapters) or "none"}.{did_you_mean(name, list(model.adapters))}')
    model.adapters[name].load(source)
    settings = {key: value for key, value in cfg.model.adapters[name].items() if key not in LOCATORS}
    cfg.model.adapters[name] = ConfigDict({**settings, 'weights': str(source)})


@contextmanager
def adapter_settings(model: SDXL, scales: Mapping[str, float], active_ranges: Mapping[str, Any]) -> Iterator[None]:
    """Inside, adapters have these scales and active ranges.

    Raises:
        UserError: there is no such adapter, or it rejects the value.
    """
    with ExitStack() as stack:
        for attribute, values in (('scale', scales), ('active_range', active_ranges)):
            for name, value in values.items():
                if name not in model.adapters:
                    raise UserError(f"{attribute}s: there is no adapter '{name}'; there are "
                                    f'{", ".join(model.adapters) or "none"}.')
                adapter = model.adapters[name]
                stack.callback(setattr, adapter, attribute, getattr(adapter, attribute))
                setattr(adapter, attribute, value)
        yield


def dict_at(node: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the dict at `key`, empty if there is none.

    Raises:
        UserError: something else is there.
    """
    value = node.get(key) or {}
    if not isinstance(value, Mapping):
        raise UserError(f'{key}={value!r} must be a dict.')
    return value
