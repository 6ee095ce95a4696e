"""Check every key of a config: types against the registries, keys against the signatures of what they build."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from mmengine.config import Config

from diffengine_sdxl import registry as r
from diffengine_sdxl.config.signatures import accepted, described, fits, is_scalar
from diffengine_sdxl.errors import UserError, did_you_mean, listed
from diffengine_sdxl.field_names import training_hint
from diffengine_sdxl.limits import check_limits
from diffengine_sdxl.registry import SCOPE, NamedRegistry
from diffengine_sdxl.request import OPTIONS, Request
from diffengine_sdxl.speed import check_settings

#: Where metrics stand: one, a list, or an evaluator's.
METRIC_PLACES = ('*_evaluator', '*_evaluator.[0-9]*', '*_evaluator.metrics.*')
#: Path in a config -> the registry of the type there; '*' matches one part of the path.
PLACES: list[tuple[str, NamedRegistry]] = [
    *((f'{model}{path}', registry) for model in ('model', 'refiner') for path, registry in (
        ('', r.MODELS), ('.adapters.*', r.ADAPTERS), ('.sampler', r.SAMPLERS),
        ('.sampler.guidances.*', r.GUIDANCES))),
    ('model.objective', r.OBJECTIVES),
    ('model.objective.noise', r.NOISES), ('model.objective.noise.inner', r.NOISES),
    ('model.objective.timesteps', r.TIMESTEPS),
    ('model.objective.weighting', r.WEIGHTINGS), ('model.objective.loss', r.LOSSES),
    # A data set, of which some hold others; also of a metric: that of the training images, or of real ones.
    *((f'{place}{part}{path}', registry)
      for place in ('*_dataloader.dataset', 'default_hooks.*.dataset', 'custom_hooks.*.dataset',
                    *(f'{metric}.{key}' for metric in METRIC_PLACES for key in ('dataset', 'real')))
      for part in ('', '.instance', '.prior', '.sets.*')
      for path, registry in (('', r.DATASETS), ('.transforms.*', r.TRANSFORMS))),
    *((f'{metric}.extractor', r.TRANSFORMS) for metric in METRIC_PLACES),
    ('*_dataloader.sampler', r.DATA_SAMPLERS),
    *zip(METRIC_PLACES, (r.EVALUATOR, r.METRICS, r.METRICS), strict=True),
    ('default_hooks.*', r.HOOKS),
    ('custom_hooks.*', r.HOOKS), ('train_cfg', r.LOOPS), ('val_cfg', r.LOOPS), ('test_cfg', r.LOOPS),
    ('optim_wrapper', r.OPTIM_WRAPPERS), ('optim_wrapper.optimizer', r.OPTIMIZERS),
    ('param_scheduler', r.PARAM_SCHEDULERS), ('param_scheduler.[0-9]*', r.PARAM_SCHEDULERS),
    ('visualizer', r.VISUALIZERS), ('visualizer.vis_backends.*', r.VISBACKENDS), ('log_processor', r.LOG_PROCESSORS),
]
#: Sections without a type: key -> annotation. The first is the config itself.
SECTIONS: dict[str, dict[str, Any]] = {
    '': {**dict.fromkeys(('work_dir', 'load_from', 'experiment_name', 'default_scope'), str | None),
         **dict.fromkeys(('randomness', 'env_cfg', 'auto_scale_lr', 'default_hooks', 'infer_cfg', 'custom_imports'),
                         Mapping[str, Any] | None),
         'custom_hooks': Sequence[Mapping[str, Any]] | None, 'custom_imports_folders': Sequence[str],
         'resume': bool | str | None, 'find_unused_parameters': bool, 'launcher': Literal['none', 'pytorch', 'slurm',
                                                                                          'mpi'],
         'log_level': int | Literal['DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL'],
         'limits': Mapping[str, float] | None, 'speed': Mapping[str, str] | None,
         'cache': str | Mapping[str, Any] | None},
    'cache': {'folder': str, 'read_only': bool},
    'randomness': {'seed': int | None, 'deterministic': bool, 'diff_rank_seed': bool},
    'env_cfg': {'cudnn_benchmark': bool, 'mp_cfg': Mapping[str, Any], 'dist_cfg': Mapping[str, Any] | None,
                'resource_limit': int, 'allow_tf32': bool},
    'env_cfg.mp_cfg': {'mp_start_method': Literal['fork', 'spawn', 'forkserver'], 'opencv_num_threads': int},
    'env_cfg.dist_cfg': {'backend': str | None, 'timeout': float},
    'auto_scale_lr': {'enable': bool, 'base_batch_size': int},
    'optim_wrapper.loss_scale': {'init_scale': float, 'growth_factor': float, 'backoff_factor': float,
                                 'growth_interval': int, 'enabled': bool},
}
#: What a data loader takes besides the arguments of torch's, or with another annotation.
DATALOADER = {'dataset': Mapping[str, Any], 'sampler': Mapping[str, Any] | None, 'batch_size': int}
#: Arguments without a default that the runner gives to what it builds.
SUPPLIED: dict[int, tuple[str, ...]] = {
    id(r.LOOPS): ('runner', 'dataloader', 'evaluator'), id(r.OPTIMIZERS): ('params',), id(r.VISBACKENDS): ('save_dir',),
    id(r.PARAM_SCHEDULERS): ('optimizer',), id(r.DATA_SAMPLERS): ('dataset',)}
#: Where a list of parts may replace a single one.
LISTS = ('*_evaluator', 'param_scheduler')
#: Where a part may omit its type, because there is a default.
TYPELESS = ('*_evaluator', 'val_cfg', 'test_cfg', 'visualizer', 'log_processor')
#: That default, if its keys can be checked.
DEFAULT_TYPES = {'val_cfg': 'ValLoop', 'test_cfg': 'TestLoop', 'val_evaluator': 'Evaluator',
                 'test_evaluator': 'Evaluator'}
#: Keys that mmengine reads before it builds the class.
EXTRA: dict[str, dict[str, Any]] = {
    'default_hooks.*': {'priority': int | str}, 'custom_hooks.*': {'priority': int | str},
    'optim_wrapper': {'constructor': str, 'paramwise_cfg': Mapping[str, Any] | None}}


def check(config: Config) -> None:
    """Check all types, keys and values of `config` before anything is built of it.

    Raises:
        UserError: a type or a key is unknown, with the nearest names; an argument that must be set is not; or a value
            does not fit the annotation of the argument that it is for.
    """
    plain = config.to_dict()
    _check_names(plain, '')
    _walk(plain, '', in_list=False)
    if plain.get('infer_cfg') is not None:
        _check_infer_cfg(plain['infer_cfg'])
    check_limits(plain.get('limits') or {})
    check_settings(plain.get('speed') or {})


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


def _check_names(node: Any, path: str) -> None:
    """Check that the keys of all dicts are texts: an adapter named 1 has no place in a state dict."""
    for key, child in node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(
            node, list | tuple) else ():
        if isinstance(node, Mapping) and not isinstance(key, str):
            raise UserError(f"{path or 'the config'} has the key {key!r}; write '{key}', as keys are texts.")
        _check_names(child, f'{path}.{key}' if path else str(key))


def _walk(node: Any, path: str, in_list: bool) -> None:
    """Check the node at `path`, and all below it.

    Args:
        in_list: whether it is an entry of a list, which cannot be None.
    """
    registry = next((reg for pattern, reg in PLACES if _matches(path, pattern)), None)
    if registry is r.EVALUATOR and isinstance(node, Mapping) and 'metrics' not in node:
        registry = r.METRICS  # a single metric
    elif path in DEFAULT_TYPES and isinstance(node, Mapping):
        node = {'type': DEFAULT_TYPES[path], **node}
    if registry is not None and not isinstance(node, Mapping | None if not in_list else Mapping) and not (
            isinstance(node, list | tuple) and _matches(path, *LISTS)):
        raise UserError(f'{path}={reprlib.repr(node)} must be a dict with a `type`{"" if in_list else ", or None"}.')
    if node is not None and not isinstance(node, list | tuple | Mapping) and _matches(
            f'{path}.x', *(pattern for pattern, _ in PLACES if pattern.endswith('.*'))):
        raise UserError(f'{path}={node!r} must be a list or dict of parts, each with a `type`.')
    if isinstance(node, list | tuple):
        for i, child in enumerate(node):
            _walk(child, f'{path}.{i}', in_list=True)
        return
    if not isinstance(node, Mapping):
        return
    if registry is not None and 'type' not in node and (registry is r.METRICS or not _matches(path, *TYPELESS)):
        names = registry.names()
        raise UserError(f'{path} has no `type`; ' + (f'add {path}.type={names[0]}.' if len(names) == 1 else
                                                     f'the known ones are {listed(names, 12)}.'))
    if registry is not None and 'type' in node:
        _check_part(node, path, registry)
    elif registry is None:
        _check_section(node, path)
    for key, child in node.items():
        _walk(child, f'{path}.{key}' if path else key, in_list=False)


def _check_section(node: Mapping[str, Any], path: str) -> None:
    """Check a section without a type; that the config has no unknown key itself is checked as it is read."""
    known = SECTIONS.get(path, {})
    if path.endswith('_dataloader') and '.' not in path:
        from torch.utils.data import DataLoader
        known = {name: parameter.annotation if is_scalar(parameter.annotation) else Any
                 for name, parameter in (accepted(DataLoader) or {}).items()} | DATALOADER
        if 'dataset' not in node:
            raise UserError(f'{path} has no `dataset`.')
    for key, value in node.items() if known else ():
        if path and key not in known:
            near = did_you_mean(key, list(known)) or training_hint(key, value)
            raise UserError(f"{path} has no key '{key}'.{near}")
        _check_value(f'{path}.{key}' if path else key, value, known.get(key, Any))


def _check_part(node: Mapping[str, Any], path: str, registry: NamedRegistry) -> None:
    """Check what a registry builds: its type, its keys and their values, by the signature of its class."""
    cls: Any = node['type']
    if isinstance(cls, str):
        try:
            cls = registry.get(cls)
        except UserError as error:
            raise UserError(f'{path}: {error}') from None
    elif not callable(cls):
        raise UserError(f'{path}.type={cls!r} must be the name of a {registry.name}.')
    known = accepted(cls)
    if known is None:
        return
    extra = next((keys for pattern, keys in EXTRA.items() if _matches(path, pattern)), {})
    # The annotations of other packages are not always right.
    ours = str(getattr(cls, '__module__', '')).startswith(SCOPE)
    for key, value in node.items():
        parameter = known.get(key)
        if parameter is None:
            if key not in extra and key not in ('type', '_scope_'):
                near = did_you_mean(key, sorted({*known, *extra})) or training_hint(key, value)
                raise UserError(f"{path} ({node['type']}) has no key '{key}'.{near}")
            _check_value(f'{path}.{key}', value, extra.get(key, Any))
        elif value is None and parameter.default is parameter.empty and ours:
            raise UserError(f"{path} ({node['type']}) needs `{key}`, which is None.")
        elif value is not parameter.default:
            hint = parameter.annotation if ours or is_scalar(parameter.annotation) else Any
            _check_value(f'{path}.{key}', value, _by_default(parameter.default) if hint is Any else hint)
    missing = [name for name, parameter in known.items() if parameter.default is parameter.empty
               and name not in (*node, *SUPPLIED.get(id(registry), ()))]
    if ours and missing:
        raise UserError(f"{path} ({node['type']}) needs `{missing[0]}`; add {path}.{missing[0]}.")


def _by_default(default: Any) -> Any:
    """Return what an argument without an annotation takes: where the default is a number, a number at least."""
    return bool if isinstance(default, bool) else float | None if isinstance(default, int | float) else Any


def _check_value(path: str, value: Any, hint: Any) -> None:
    # What a registry builds of a dict is checked as a part.
    if isinstance(value, Mapping) and 'type' in value and any(_matches(path, pattern) for pattern, _ in PLACES):
        return
    if not fits(value, hint):
        whole = isinstance(value, float) and value.is_integer() and fits(int(value), hint)
        hint_text = f'; write {int(value)}' if whole else f', as {path.rpartition(".")[2]}=[{value!r}]' if isinstance(
            value, str) and fits([value], hint) else ''
        raise UserError(f'{path}={reprlib.repr(value)} must be {described(hint)}{hint_text}.')


def _matches(path: str, *patterns: str) -> bool:
    """Return whether `path` matches one of `patterns`, part by part."""
    parts = path.split('.')
    return any(len(parts) == len(pattern.split('.')) and all(map(fnmatchcase, parts, pattern.split('.')))
               for pattern in patterns)
