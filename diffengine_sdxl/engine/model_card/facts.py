"""What a card says of a run: base, data, recipe and command, without paths of the machine that it ran on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from diffengine_sdxl.errors import count_of
from diffengine_sdxl.loading.hub import parse_file_link
from diffengine_sdxl.loading.strict import SHIPPED

#: Bases whose licence the hub names so.
_LICENSES = {'stabilityai/stable-diffusion-xl-base-1.0': 'openrail++',
             'stabilityai/stable-diffusion-xl-refiner-1.0': 'openrail++'}
#: Keys of configs whose values are texts: a '/' in them is no path.
_TEXTS = frozenset((
    'prompt', 'prompts', 'negative_prompt', 'instance_prompt', 'class_prompt', 'text', 'caption', 'default_caption',
    'template', 'templates', 'title', 'description', 'author', 'usage_hint', 'trigger_words', 'tags', 'token', 'init',
    'metric', 'keep_best'))
#: How an absolute path, one of a home folder, an explicitly relative one, or a link begins.
_ABSOLUTE = re.compile(r'[a-z][a-z0-9+.-]+:/|[a-z]:[\\/]|\\\\|~|\.{0,2}/', re.IGNORECASE)
#: One of these within a text.
_PATH = re.compile(r'(?<![\w.~/-])(?:[a-z]+://[^\s\'"]*|(?:~|\.{0,2})/[^\s\'"=,()\[\]{}]*)')
#: A text within a list or dict of a command: in quotes, or without.
_ITEM = re.compile(r'\'[^\']*\'|"[^"]*"|[^\s,()\[\]{}\'"=:][^,()\[\]{}\'"=]*')


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
    return hub_id(source, on_hub) or public_text(str(source), on_hub)


def in_package(source: Any) -> bool:
    """Return whether a source of a config is a folder of this package."""
    return isinstance(source, str) and source.startswith(SHIPPED)


def public_text(text: str, on_hub: Collection[str] = (), key: str = '') -> str:
    """Reduce a path, and a link that is not the hub's, to its last part.

    Args:
        on_hub: ids of the hub, which are kept; see the manifest's `hub`.
        key: whose value it is; a few hold texts, of which only what is a path for certain is reduced.
    """
    if text in on_hub or in_package(text):
        return text
    if parse_file_link(text):
        return text.partition('?')[0]
    if key in _TEXTS and not _ABSOLUTE.match(text):
        return _PATH.sub(lambda match: public_text(match[0]), text)
    return _last_part(text) if re.search(r'[\\/]', text) or _ABSOLUTE.match(text) else text


def _last_part(path: str) -> str:
    """Return the last part of a path, also of Windows, or of a link."""
    name = PureWindowsPath(path.partition('?')[0] if '://' in path else path).name or path
    return '~' if name.startswith('~') else name


def public_values(node: Any, on_hub: Collection[str] = (), key: str = '') -> Any:
    """Return a copy of plain data in which `public_text` was applied to each text."""
    if isinstance(node, Mapping):
        return {name: public_values(value, on_hub, str(name)) for name, value in node.items()}
    if isinstance(node, list):
        return [public_values(value, on_hub, key) for value in node]
    return public_text(node, on_hub, key) if isinstance(node, str) else node


def public_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a manifest that names no folder of the machine."""
    on_hub = manifest.get('hub') or ()
    command = manifest.get('command')
    return {**public_values(manifest, on_hub), 'command': public_command(command, on_hub) if command else None}


def public_command(command: str, on_hub: Collection[str] = ()) -> str:
    """Return a command line without its work_dir, the paths in it reduced to their last part."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        if word == '--work-dir':
            next(words, None)
        elif not word.startswith('--work-dir='):
            kept.append(_public_word(word, on_hub))
    return shlex.join(kept)


def _public_word(word: str, on_hub: Collection[str]) -> str:
    match = re.match(r'-{0,2}[\w.\[\]-]+=', word)
    name, value = (match[0], word[match.end():]) if match else ('', word)
    key = name.strip('-=').rpartition('.')[2]
    if not value.startswith(('[', '(', '{', '"', "'", 'dict(')):
        return name + public_text(value, on_hub, key)

    def item(match: re.Match[str]) -> str:
        quote = match[0][0] if match[0][0] in '\'"' else ''
        return f'{quote}{public_text(match[0].strip(quote) if quote else match[0], on_hub, key)}{quote}'
    return name + _ITEM.sub(item, value)


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
        manifest: of the export, public. run: run.json, or {}.
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
    # Where epochs are given, the config has no length; an older manifest has the config's only.
    length = manifest.get('max_iters') or (config.get('train_cfg') or {}).get('max_iters') or step
    found = {
        'steps': f'{step:,} of {length:,}{epochs}',
        'rows of a step': f'{batch} (batch {split["batch_size"]} x {split["accumulative_counts"]} accumulated x '
                          f'{count_of(split["processes"], "process", "processes")})' if split else '',
        'learning rate': f'{rate}' if rate is not None else '',
        'schedule': ', '.join(_call(one) for one in (schedule if isinstance(schedule, list) else [schedule])),
        'optimizer': _call(optimizer), 'objective': _call((config.get('model') or {}).get('objective') or {}),
        'partners': '; '.join(_partner(name, drawn) for name, drawn in (
            (config.get('model') or {}).get('partners') or {}).items() if drawn is not None),
        'resolution': ' x '.join(map(str, reversed(size))) if resolution else '',
        'precision': 'fp32' if precision == 'no' else precision,
        'weights': 'averages (EMA)' if manifest.get('ema') else 'as trained', 'seed': f'{manifest.get("seed")}',
        'speed': ', '.join(f'{key} {value}' for key, value in speed.items())}
    return {name: value for name, value in found.items() if value}


def _partner(name: str, drawn: Mapping[str, Any]) -> str:
    """Say on how much of the samples an adapter acted, and what was drawn for it."""
    values = [f'{key} {value}' for key, value in drawn.items() if key != 'prob']
    return ', '.join([f'{name} on {drawn.get("prob", 0.5):.0%} of the samples', *values])


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
