"""What a card says of a run: base, data, recipe and command, without paths of the machine that it ran on."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from diffengine_sdxl.errors import count_of
from diffengine_sdxl.loading.hub import parse_file_link

#: Bases whose licence the hub names so.
_LICENSES = {'stabilityai/stable-diffusion-xl-base-1.0': 'openrail++',
             'stabilityai/stable-diffusion-xl-refiner-1.0': 'openrail++'}
#: A path in a command: what begins with '/', '~', './' or '../', and links.
_PATH = re.compile(r'(?<![\w.~/-])(?:[a-z]+://[^\s\'"]*|(?:~|\.{0,2})/[^\s\'"=,()\[\]{}]*)')


def hub_id(source: Any, on_hub: Collection[str]) -> str | None:
    """Return the hub's repository that a source of a config names, or None.

    Args:
        on_hub: the manifest's `hub`.
    """
    if not isinstance(source, str):
        return None
    link = parse_file_link(source)
    return link[0] if link else source if source in on_hub else None


def public_name(source: Any, on_hub: Collection[str]) -> str:
    """Return the repository that a source names, or the last part of its path or link."""
    name = str(source).partition('?')[0].rstrip('/')
    return hub_id(source, on_hub) or PurePosixPath(name).name or str(source)


def public_text(text: str) -> str:
    """Replace each path, and each link that is not the hub's, by its last part."""
    return _PATH.sub(lambda match: match[0] if parse_file_link(match[0]) else public_name(match[0], ()), text)


def public_values(node: Any) -> Any:
    """Return a copy of plain data in which `public_text` was applied to each text."""
    if isinstance(node, Mapping):
        return {key: public_values(value) for key, value in node.items()}
    if isinstance(node, list):
        return [public_values(value) for value in node]
    return public_text(node) if isinstance(node, str) else node


class DataSet(NamedTuple):
    """A data set of a config.

    Attributes:
        name: for people. repo: the hub's, or None. kind: its type. split: '' if it has none.
        columns: what is read -> the column that it is in.
    """

    name: str
    repo: str | None
    kind: str
    split: str
    columns: dict[str, str]


def data_sets(config: Mapping[str, Any] | None, on_hub: Collection[str]) -> Iterator[DataSet]:
    """Yield the data sets in the config of one, which may consist of several."""
    if not config:
        return
    inner = [*(config.get('sets') or {}).values(), config.get('instance'), config.get('prior')]
    if any(inner):
        for one in inner:
            yield from data_sets(one, on_hub)
        return
    source, kind = config.get('source'), str(config.get('type'))
    columns = {key.removesuffix('_column').replace('_', ' '): str(value) for key, value in config.items()
               if key.endswith('_column') and value}
    yield DataSet(kind if source is None else public_name(source, on_hub), hub_id(source, on_hub), kind,
                  str(config.get('split') or ''), columns)


def recipe(manifest: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, str]:
    """Return the rows of the table of the recipe, name -> value.

    Args:
        manifest: of the export. run: run.json, or {}.
    """
    config, step = manifest['config'], manifest['step']
    wrapper = config.get('optim_wrapper') or {}
    optimizer = dict(wrapper.get('optimizer') or {})
    rate, schedule = optimizer.pop('lr', None), config.get('param_scheduler') or []
    split = (run.get('identity') or {}).get('split') or {}
    batch = split.get('batch_size', 1) * split.get('accumulative_counts', 1) * split.get('processes', 1)
    rows, resolution = manifest.get('rows'), config.get('resolution')
    epochs = f', {step * batch / rows:.3g} epochs' if split and rows else ''
    precision = str(config.get('mixed_precision') or (config.get('model') or {}).get('mixed_precision') or '')
    size = resolution if isinstance(resolution, list) else [resolution] * 2
    speed = manifest.get('speed') or {}
    found = {
        'steps': f'{step:,} of {(config.get("train_cfg") or {}).get("max_iters", step):,}{epochs}',
        'rows of a step': f'{batch} (batch {split["batch_size"]} x {split["accumulative_counts"]} accumulated x '
                          f'{count_of(split["processes"], "process", "processes")})' if split else '',
        'learning rate': f'{rate}' if rate is not None else '',
        'schedule': ', '.join(_call(one) for one in (schedule if isinstance(schedule, list) else [schedule])),
        'optimizer': _call(optimizer), 'objective': _call((config.get('model') or {}).get('objective') or {}),
        'resolution': ' x '.join(map(str, reversed(size))) if resolution else '',
        'precision': 'fp32' if precision == 'no' else precision,
        'weights': 'averages (EMA)' if manifest.get('ema') else 'as trained', 'seed': f'{manifest.get("seed")}',
        'speed': ', '.join(f'{key} {value}' for key, value in speed.items())}
    return {name: value for name, value in found.items() if value}


def _call(config: Mapping[str, Any]) -> str:
    """Format a config as 'AdamW(weight_decay=0.01)', without what is not given."""
    arguments = [f'{key}={_call(value) if isinstance(value, Mapping) else value}' for key, value in config.items()
                 if key != 'type' and value not in (None, {}, [])]
    return str(config.get('type', '')) + (f'({", ".join(arguments)})' if arguments else '')


def header(folder: Path) -> dict[str, str]:
    """Return the ModelSpec fields of an export's part, without their prefix; {} if no file has some."""
    for file in sorted(folder.rglob('*.safetensors')):
        try:
            with safe_open(file, framework='pt') as content:
                metadata = content.metadata() or {}
        except (SafetensorError, OSError):
            continue
        return {key.removeprefix('modelspec.'): value for key, value in metadata.items()
                if key.startswith('modelspec.')}
    return {}


def license_of(chosen: str | None, base: str | None) -> dict[str, str]:
    """Return the fields of the hub's metadata for a licence: the user's, else the base's; {} if neither is known."""
    name = chosen or _LICENSES.get(base or '')
    if not name:
        return {}
    if re.fullmatch(r'[A-Za-z0-9.+-]+', name):
        return {'license': name.lower()}
    return {'license': 'other', 'license_name': re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-') or 'custom'}
