"""Every key of a config against what reads it: registries know the names, signatures the keys."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from mmengine.config import Config

from diffengine_sdxl import registry as r
from diffengine_sdxl.registry import NamedRegistry, nearest

#: Where in a config which registry's names stand; '*' is one part of the path.
PLACES: list[tuple[str, NamedRegistry]] = [
    *((model, r.MODELS) for model in ('model', 'refiner')),
    *((f'{model}.adapters.*', r.ADAPTERS) for model in ('model', 'refiner')),
    *((f'{model}.sampler', r.SAMPLERS) for model in ('model', 'refiner')),
    *((f'{model}.sampler.guidances.*', r.GUIDANCES) for model in ('model', 'refiner')),
    ('model.objective', r.OBJECTIVES),
    ('model.objective.noise', r.NOISES), ('model.objective.noise.base', r.NOISES),
    ('model.objective.timesteps', r.TIMESTEPS),
    ('model.objective.weighting', r.WEIGHTINGS), ('model.objective.loss', r.LOSSES),
    ('*_dataloader.dataset', r.DATASETS),
    *((f'*_dataloader.dataset.{half}', r.DATASETS) for half in ('instance', 'prior')),
    *((f'*_dataloader.dataset.{half}.transforms.*', r.TRANSFORMS) for half in ('instance', 'prior')),
    ('*_dataloader.sampler', r.DATA_SAMPLERS), ('*_dataloader.dataset.transforms.*', r.TRANSFORMS),
    ('*_evaluator', r.EVALUATOR), ('*_evaluator.metrics.*', r.METRICS), ('*_evaluator.[0-9]*', r.METRICS),
    ('default_hooks.*', r.HOOKS),
    ('custom_hooks.*', r.HOOKS), ('train_cfg', r.LOOPS), ('val_cfg', r.LOOPS), ('test_cfg', r.LOOPS),
    ('optim_wrapper', r.OPTIM_WRAPPERS), ('optim_wrapper.optimizer', r.OPTIMIZERS),
    ('param_scheduler', r.PARAM_SCHEDULERS), ('param_scheduler.[0-9]*', r.PARAM_SCHEDULERS),
    ('visualizer', r.VISUALIZERS), ('visualizer.vis_backends.*', r.VISBACKENDS), ('log_processor', r.LOG_PROCESSORS),
]
#: Keys of sections that no class reads as a whole.
SECTIONS: dict[str, tuple[str, ...]] = {
    'train_dataloader': (), 'val_dataloader': (), 'test_dataloader': (),  # filled from torch's DataLoader
    'randomness': ('seed', 'deterministic', 'diff_rank_seed'),
    'env_cfg': ('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit', 'allow_tf32'),
    'env_cfg.mp_cfg': ('mp_start_method', 'opencv_num_threads'),
    'auto_scale_lr': ('enable', 'base_batch_size'),
    'optim_wrapper.loss_scale': ('init_scale', 'growth_factor', 'backoff_factor', 'growth_interval', 'enabled'),
}
#: Where a list of parts may stand in place of one.
LISTS = ('*_evaluator', 'param_scheduler')
#: Where a part may leave out its type: something has a default.
TYPELESS = ('*_evaluator', 'val_cfg', 'test_cfg', 'optim_wrapper', 'visualizer', 'log_processor')
#: What it is then, where its keys can be checked.
DEFAULT_TYPES = {'val_cfg': 'ValLoop', 'test_cfg': 'TestLoop', 'val_evaluator': 'Evaluator',
                 'test_evaluator': 'Evaluator'}
#: Read by mmengine's registries or constructors before a class sees the rest.
EXTRA = {'default_hooks.*': {'priority'}, 'custom_hooks.*': {'priority'},
         'optim_wrapper': {'constructor', 'paramwise_cfg'}}


def check(config: Config) -> None:
    """Walk through `config`.

    Raises:
        ValueError: a type is not registered, or a key is not known to what would read it; with the nearest names.
    """
    _walk(config.to_dict(), '')
    if config.get('infer_cfg') is not None:
        _check_infer_cfg(config.to_dict()['infer_cfg'])


def _check_infer_cfg(node: Any) -> None:
    if not isinstance(node, Mapping):
        raise ValueError(f'infer_cfg={node!r} must be a dict of what is asked for; see docs/inference.md.')
    from diffengine_sdxl.engine.inference.request import OPTIONS, Request
    for key in OPTIONS:
        if not isinstance(node.get(key, False), bool):
            raise ValueError(f'infer_cfg.{key}={node[key]!r} must be True or False.')
    try:
        Request.of({k: v for k, v in node.items() if k not in OPTIONS}, whole=False)
    except ValueError as error:
        raise ValueError(f'infer_cfg: {error}') from None


def _walk(node: Any, path: str) -> None:
    registry = next((reg for place, reg in PLACES if _at(path, place)), None)
    if registry is r.EVALUATOR and isinstance(node, Mapping) and 'metrics' not in node:
        registry = r.METRICS  # one metric, without a list
    elif path in DEFAULT_TYPES and isinstance(node, Mapping):
        node = {'type': DEFAULT_TYPES[path], **node}
    if registry is not None and not isinstance(node, Mapping | None) and not (
            isinstance(node, list | tuple) and any(_at(path, place) for place in LISTS)):
        raise ValueError(f'{path}={node!r} is no part of a config: it must be a dict with a `type`, or None.')
    if node is not None and not isinstance(node, list | tuple | Mapping) and any(
            _at(f'{path}.x', place) for place, _ in PLACES if place.endswith('.*')):
        raise ValueError(f'{path}={node!r} must be a list or dict of parts, each with a `type`.')
    if isinstance(node, list | tuple):
        for i, child in enumerate(node):
            _walk(child, f'{path}.{i}')
        return
    if not isinstance(node, Mapping):
        return
    if registry is not None and 'type' not in node and (
            registry is r.METRICS or not any(_at(path, place) for place in TYPELESS)):
        raise ValueError(f"{path} has no `type`; the known ones are {', '.join(registry.names()[:12])}.")
    if registry is not None and isinstance(node.get('type'), str):
        _check_keys(node, path, registry)
    elif path in SECTIONS:
        known = dict.fromkeys(SECTIONS[path]) or _dataloader_keys()
        for key, value in node.items():
            if key not in known:
                raise ValueError(f"{path} has no key '{key}'.{nearest(str(key), list(known))}")
            _check_number(f'{path}.{key}', value, known[key])
    for key, child in node.items():
        _walk(child, f'{path}.{key}' if path else str(key))


def _check_keys(node: Mapping[str, Any], path: str, registry: NamedRegistry) -> None:
    try:
        cls = registry.get(node['type'])
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    known = accepted(cls)
    if known is None:
        return
    extra = next((keys for place, keys in EXTRA.items() if _at(path, place)), set())
    for key, value in node.items():
        if key not in known and key not in extra and key not in ('type', '_scope_'):
            hint = nearest(str(key), sorted({*known, *extra}))
            raise ValueError(f"{path} ({node['type']}) has no key '{key}'.{hint}")
        _check_number(f'{path}.{key}', value, known.get(key))


def _check_number(path: str, value: Any, parameter: inspect.Parameter | None) -> None:
    """Refuse what is no number where one is due: most constructors would fail on it with a traceback."""
    if parameter is None:
        return
    default, hint = parameter.default, str(parameter.annotation)
    hinted = {part.strip() for part in hint.removeprefix("<class '").removesuffix("'>").split('|')}
    if not (isinstance(default, int | float) or hinted and hinted <= {'int', 'float', 'bool', 'None'}):
        return
    if isinstance(value, int | float) or (value is None and ('None' in hint or 'Optional' in hint)):
        return
    # Without an annotation, or with a wider one, only words are surely wrong.
    if isinstance(value, str) and 'str' not in hint or hinted <= {'int', 'float', 'bool', 'None'}:
        wanted = 'True or False' if isinstance(default, bool) else 'a number'
        raise ValueError(f'{path}={value!r} must be {wanted}.')


def accepted(cls: Any) -> dict[str, Any] | None:
    """The keyword arguments that building `cls` takes, by name, through all classes that pass on **kwargs.

    None if it takes any.
    """
    if not inspect.isclass(cls):
        own, open_ended = _parameters(cls)
        return None if open_ended else own
    names: dict[str, Any] = {}
    for base in cls.__mro__:
        if '__init__' not in vars(base):
            continue
        if base is object:
            return names
        try:
            own, open_ended = _parameters(vars(base)['__init__'])
        except (ValueError, TypeError):
            return None
        if own is None:
            return None
        names = {**own, **names}
        if not open_ended:
            break
    names.pop('self', None)
    return names


def _parameters(function: Any) -> tuple[dict[str, Any] | None, bool]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return None, False
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _dataloader_keys() -> dict[str, Any]:
    from torch.utils.data import DataLoader
    return {k: p for k, p in inspect.signature(DataLoader.__init__).parameters.items() if k != 'self'}


def _at(path: str, place: str) -> bool:
    """Whether `path` is at `place`, part by part."""
    parts, places = path.split('.'), place.split('.')
    return len(parts) == len(places) and all(fnmatchcase(a, b) for a, b in zip(parts, places, strict=True))
