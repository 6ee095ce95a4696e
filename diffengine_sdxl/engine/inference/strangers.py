"""What a PNG says of itself may be a stranger's: data of known forms and sizes, which names this package's parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffengine_sdxl import registry
from diffengine_sdxl.engine.inference.request import Request
from diffengine_sdxl.hub import COMMIT

#: Sections of a config that a picture may bring.
CONFIG = ('model', 'refiner', 'infer_cfg', 'randomness')
REGISTRIES = (registry.MODELS, registry.ADAPTERS, registry.SAMPLERS, registry.GUIDANCES)
#: Dicts and lists in each other, at most; a config has some eight.
DEEPEST = 32
#: Keys whose number is work or memory, or whose list is; and what is taken of each. Training has 1000 steps.
COUNTS = ('num_inference_steps', 'timesteps', 'sigmas', 'num_train_timesteps', 'rank', 'num_tokens')
MOST_COUNT = 10_000
#: Entries of `guidances` and `adapters`, letters of a text (compel's parser is quadratic), and pixels.
MOST_PARTS, MOST_LETTERS, MOST_PIXELS = 32, 20_000, 2**26


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


def check_form(settings: Mapping[str, Any]) -> None:
    """Refuse settings that lack a part, or in which a part is of another kind than `record` makes it.

    Raises:
        ValueError: names the part.
    """
    _check_values(settings, '', 0)
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
            parts += [(f'{name}.{i}.{k}', _at(entry, k), str, k == 'key')
                      for k in ('key', 'path', 'sha256', 'revision', 'commit')]
    for place, value, kind, needed in parts:
        if not isinstance(value, kind) and (needed or value is not None):
            raise ValueError(f"'{place}' must be a {kind.__name__}.")
    for i, entry in enumerate(settings['sources']):
        if not COMMIT.fullmatch(entry.get('commit') or '0' * 40):
            raise ValueError(f"'sources.{i}.commit' is none.")
    request = Request.of(settings['request'])
    if (request.height or 1) * (request.width or 1) > MOST_PIXELS:
        raise ValueError(f"'request' asks for {request.height} x {request.width} pixels; more than {MOST_PIXELS} are "
                         'taken from no picture.')


def _check_values(node: Any, path: str, depth: int) -> None:
    """Refuse what no config and no request holds, and what would never end.

    Raises:
        ValueError: names the place.
    """
    if depth > DEEPEST:
        raise ValueError(f"'{path[:60]}...' is nested more than {DEEPEST} deep.")
    if isinstance(node, int) and not -2**63 <= node < 2**63:
        raise ValueError(f"'{path}' is a number of {node.bit_length()} bits.")
    for key, value in _items(node):
        place = f'{path}.{key}' if path else str(key)
        _check_values(value, place, depth + 1)
        if isinstance(value, str) and len(value) > MOST_LETTERS:
            raise ValueError(f"'{place}' has {len(value)} letters; more than {MOST_LETTERS} are taken from no picture.")
        if key in ('guidances', 'adapters') and isinstance(value, list | dict) and len(value) > MOST_PARTS:
            raise ValueError(f"'{place}' has {len(value)} entries; more than {MOST_PARTS} are taken from no picture.")
        many = len(value) if isinstance(value, list) else value
        if key in COUNTS and isinstance(many, int | float) and not many <= MOST_COUNT:
            raise ValueError(f"'{place}' asks for {many}; more than {MOST_COUNT} is taken from no picture.")


def _items(node: Any) -> list[tuple[Any, Any]]:
    return list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())


def _at(node: Any, key: str) -> Any:
    return node.get(key) if isinstance(node, dict) else None
