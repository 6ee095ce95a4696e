"""Check every key of a config: types against the registries, keys against the signatures of what they build."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from mmengine.config import Config

from diffengine_sdxl import registry as r
from diffengine_sdxl.errors import UserError, did_you_mean, listed
from diffengine_sdxl.field_names import training_hint
from diffengine_sdxl.registry import NamedRegistry
from diffengine_sdxl.request import OPTIONS, Request

#: Path in a config -> the registry of the type there; '*' matches one part of the path.
PLACES: list[tuple[str, NamedRegistry]] = [
    *((f'{model}{path}', registry) for model in ('model', 'refiner') for path, registry in (
        ('', r.MODELS), ('.adapters.*', r.ADAPTERS), ('.sampler', r.SAMPLERS),
        ('.sampler.guidances.*', r.GUIDANCES))),
    ('model.objective', r.OBJECTIVES),
    ('model.objective.noise', r.NOISES), ('model.objective.noise.inner', r.NOISES),
    ('model.objective.timesteps', r.TIMESTEPS),
    ('model.objective.weighting', r.WEIGHTINGS), ('model.objective.loss', r.LOSSES),
    ('*_dataloader.dataset', r.DATASETS),
    *((f'*_dataloader.dataset.{part}', r.DATASETS) for part in ('instance', 'prior')),
    *((f'*_dataloader.dataset.{part}.transforms.*', r.TRANSFORMS) for part in ('instance', 'prior')),
    ('*_dataloader.sampler', r.DATA_SAMPLERS), ('*_dataloader.dataset.transforms.*', r.TRANSFORMS),
    ('*_evaluator', r.EVALUATOR), ('*_evaluator.metrics.*', r.METRICS), ('*_evaluator.[0-9]*', r.METRICS),
    ('default_hooks.*', r.HOOKS),
    ('custom_hooks.*', r.HOOKS), ('train_cfg', r.LOOPS), ('val_cfg', r.LOOPS), ('test_cfg', r.LOOPS),
    ('optim_wrapper', r.OPTIM_WRAPPERS), ('optim_wrapper.optimizer', r.OPTIMIZERS),
    ('param_scheduler', r.PARAM_SCHEDULERS), ('param_scheduler.[0-9]*', r.PARAM_SCHEDULERS),
    ('visualizer', r.VISUALIZERS), ('visualizer.vis_backends.*', r.VISBACKENDS), ('log_processor', r.LOG_PROCESSORS),
]
#: Known keys of sections without a type.
SECTIONS: dict[str, tuple[str, ...]] = {
    'train_dataloader': (), 'val_dataloader': (), 'test_dataloader': (),  # those of torch's DataLoader
    'randomness': ('seed', 'deterministic', 'diff_rank_seed'),
    'env_cfg': ('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit', 'allow_tf32'),
    'env_cfg.mp_cfg': ('mp_start_method', 'opencv_num_threads'),
    'auto_scale_lr': ('enable', 'base_batch_size'),
    'optim_wrapper.loss_scale': ('init_scale', 'growth_factor', 'backoff_factor', 'growth_interval', 'enabled'),
}
#: Where a list of parts may replace a single one.
LISTS = ('*_evaluator', 'param_scheduler')
#: Where a part may omit its type, because there is a default.
TYPELESS = ('*_evaluator', 'val_cfg', 'test_cfg', 'optim_wrapper', 'visualizer', 'log_processor')
#: That default, if its keys can be checked.
DEFAULT_TYPES = {'val_cfg': 'ValLoop', 'test_cfg': 'TestLoop', 'val_evaluator': 'Evaluator',
                 'test_evaluator': 'Evaluator'}
#: Keys that mmengine reads before it builds the class.
EXTRA = {'default_hooks.*': {'priority'}, 'custom_hooks.*': {'priority'},
         'optim_wrapper': {'constructor', 'paramwise_cfg'}}


def check(config: Config) -> None:
    """Check all types, keys and numbers of `config`.

    Raises:
        UserError: a type or a key is unknown, with the nearest names; or a value is not a number where one is needed.
    """
    plain = config.to_dict()
    _walk(plain, '')
    if plain.get('infer_cfg') is not None:
        _check_infer_cfg(plain['infer_cfg'])


def _check_infer_cfg(node: Any) -> None:
    if not isinstance(node, Mapping):
        raise UserError(f'infer_cfg={node!r} must be a dict of settings; see docs/inference.md.')
    for key in OPTIONS:
        if not isinstance(node.get(key, False), bool):
            raise UserError(f'infer_cfg.{key}={node[key]!r} must be True or False.')
    try:
        Request.of({k: v for k, v in node.items() if k not in OPTIONS}, whole=False)
    except UserError as error:
        raise UserError(f'infer_cfg: {error}') from None


def _walk(node: Any, path: str) -> None:
    registry = next((reg for pattern, reg in PLACES if _matches(path, pattern)), None)
    if registry is r.EVALUATOR and isinstance(node, Mapping) and 'metrics' not in node:
        registry = r.METRICS  # a single metric
    elif path in DEFAULT_TYPES and isinstance(node, Mapping):
        node = {'type': DEFAULT_TYPES[path], **node}
    if registry is not None and not isinstance(node, Mapping | None) and not (
            isinstance(node, list | tuple) and _matches(path, *LISTS)):
        raise UserError(f'{path}={node!r} must be a dict with a `type`, or None.')
    if node is not None and not isinstance(node, list | tuple | Mapping) and _matches(
            f'{path}.x', *(pattern for pattern, _ in PLACES if pattern.endswith('.*'))):
        raise UserError(f'{path}={node!r} must be a list or dict of parts, each with a `type`.')
    if isinstance(node, list | tuple):
        for i, child in enumerate(node):
            _walk(child, f'{path}.{i}')
        return
    if not isinstance(node, Mapping):
        return
    if registry is not None and 'type' not in node and (
            registry is r.METRICS or not _matches(path, *TYPELESS)):
        names = registry.names()
        raise UserError(f'{path} has no `type`; ' + (f'add {path}.type={names[0]}.' if len(names) == 1 else
                                                     f'the known ones are {listed(names, 12)}.'))
    if registry is not None and isinstance(node.get('type'), str):
        _check_keys(node, path, registry)
    elif path in SECTIONS:
        known = dict.fromkeys(SECTIONS[path]) or _dataloader_keys()
        for key, value in node.items():
            if key not in known:
                hint = did_you_mean(str(key), list(known)) or training_hint(str(key), value)
                raise UserError(f"{path} has no key '{key}'.{hint}")
            _check_number(f'{path}.{key}', value, known[key])
    for key, child in node.items():
        _walk(child, f'{path}.{key}' if path else str(key))


def _check_keys(node: Mapping[str, Any], path: str, registry: NamedRegistry) -> None:
    try:
        cls = registry.get(node['type'])
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    known = accepted(cls)
    if known is None:
        return
    extra = next((keys for pattern, keys in EXTRA.items() if _matches(path, pattern)), set())
    for key, value in node.items():
        if key not in known and key not in extra and key not in ('type', '_scope_'):
            hint = did_you_mean(str(key), sorted({*known, *extra})) or training_hint(str(key), value)
            raise UserError(f"{path} ({node['type']}) has no key '{key}'.{hint}")
        _check_number(f'{path}.{key}', value, known.get(key))


def _check_number(path: str, value: Any, parameter: inspect.Parameter | None) -> None:
    """Check that a numeric parameter gets a number; most constructors would fail later, with a traceback."""
    if parameter is None:
        return
    default, hint = parameter.default, str(parameter.annotation)
    hinted = {part.strip() for part in hint.removeprefix("<class '").removesuffix("'>").split('|')}
    if not (isinstance(default, int | float) or hinted and hinted <= {'int', 'float', 'bool', 'None'}):
        return
    if isinstance(value, int | float) or (value is None and ('None' in hint or 'Optional' in hint)):
        return
    # Without an annotation, or with a wider one, only a string is certainly wrong.
    if isinstance(value, str) and 'str' not in hint or hinted <= {'int', 'float', 'bool', 'None'}:
        raise UserError(f'{path}={value!r} must be {"True or False" if isinstance(default, bool) else "a number"}.')


def accepted(cls: Any) -> dict[str, Any] | None:
    """Return the keyword arguments of a class or function, also of base classes that get **kwargs; None: takes any."""
    if not inspect.isclass(cls):
        parameters, open_ended = _parameters(cls)
        return None if open_ended else parameters
    names: dict[str, Any] = {}
    for base in cls.__mro__:
        if '__init__' not in vars(base):
            continue
        if base is object:
            return names
        parameters, open_ended = _parameters(vars(base)['__init__'])
        if parameters is None:
            return None
        names = {**parameters, **names}
        if not open_ended:
            break
    names.pop('self', None)
    return names


def _parameters(function: Any) -> tuple[dict[str, Any] | None, bool]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # a builtin without a signature
        return None, False
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _dataloader_keys() -> dict[str, Any]:
    from torch.utils.data import DataLoader
    return {k: p for k, p in inspect.signature(DataLoader.__init__).parameters.items() if k != 'self'}


def _matches(path: str, *patterns: str) -> bool:
    """Return whether `path` matches one of `patterns`, part by part."""
    parts = path.split('.')
    return any(len(parts) == len(pattern.split('.')) and all(map(fnmatchcase, parts, pattern.split('.')))
               for pattern in patterns)
