"""Checks of a component's folder before anything is built: its settings, and that its weights justify their sizes."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook as on_module
from torch.nn.modules.module import register_module_parameter_registration_hook as on_parameter

from diffengine_sdxl import limits
from diffengine_sdxl.config.signatures import accepted
from diffengine_sdxl.errors import UserError, listed
from diffengine_sdxl.loading.files import check_size, read_json
from diffengine_sdxl.loading.weights import TensorInfo, check_dtypes, read_header

#: Timesteps that a scheduler may have; SDXL's have 1000.
MAX_TIMESTEPS = 100_000
#: Tensors of a model that is built without weights of its own; SDXL's UNet has 1,680.
MAX_TENSORS = 4_000
#: What `check_settings` has built: class, settings, and their bounds. Else they would be built for each load again.
_BUILT: set[tuple[Any, str, int, int]] = set()


def read_headers(folder: Path, names: Collection[str], shown: str) -> dict[str, TensorInfo]:
    """Return what the weight files of a model say of its tensors, which must be floating.

    Args:
        names: of the files in `folder`, with an index of shards if there is one. shown: the folder, for errors.

    Raises:
        UserError: a file is damaged, holds what are no weights, or a shard is missing.
    """
    for name in names:
        if name.endswith('.json'):
            shards = read_json(folder / name).get('weight_map')
            absent = sorted({str(s) for s in shards.values()} - {*names}) if isinstance(shards, dict) else [name]
            if absent:
                raise UserError(f"'{shown}': the index '{name}' names no file, or files that are missing "
                                f'({listed(absent, 3)}).')
    header: dict[str, TensorInfo] = {}
    for name in names:
        if not name.endswith('.json'):
            own = read_header(folder / name)
            check_dtypes(((key, info.dtype) for key, info in own.items()), folder / name)
            header |= own
    return header


def check_files(folder: Path) -> None:
    """Check the sizes of all files of settings and vocabularies in a folder.

    Raises:
        UserError: one is too large, or not a file.
    """
    for path in (path for pattern in ('*.json', '*.txt') for path in folder.glob(pattern)):
        check_size(path)


def check_settings(cls: Any, folder: Path, shown: str, header: Mapping[str, TensorInfo] | None = None) -> None:
    """Check a component's config.json: sizes and numbers, types by its class's signature, and what it would build.

    Args:
        cls: model class of diffusers or transformers. folder: with the config. shown: the folder, for errors.
        header: of its weights; without them `limits.model_parameters` bounds the sizes.

    Raises:
        UserError: a setting has a wrong type, or asks for more than the weights hold.
    """
    check_files(folder)
    if not (folder / 'config.json').is_file():
        return  # the loader says so
    config = read_json(folder / 'config.json')
    check_types(cls, config, f'{shown}/config.json')
    # Twice a file's, since weights that are tied are registered twice and stored once.
    num_values = (int(limits.CURRENT.model_parameters) if header is None else
                  2 * sum(math.prod(info.shape) for info in header.values()) + 2**20)
    num_tensors = MAX_TENSORS if header is None else 2 * len(header) + 1000
    if (built := (cls, json.dumps(config, sort_keys=True), num_tensors, num_values)) in _BUILT:
        return
    # Other faults are the loader's to tell; some models cannot be built on the meta device.
    with _bounded(num_tensors, num_values, shown, header is not None), suppress(Exception), torch.device('meta'):
        _build(cls, config, folder)
    _BUILT.add(built)


def _build(cls: Any, config: Mapping[str, Any], folder: Path) -> None:
    import diffusers
    import transformers
    if issubclass(cls, diffusers.ModelMixin):
        cls.from_config(dict(config))
    elif cls is transformers.AutoModel:
        cls.from_config(transformers.AutoConfig.from_pretrained(folder))
    else:
        cls(cls.config_class.from_pretrained(folder))


class _TooLarge(BaseException):
    """What a config builds exceeds its weights; no library catches it."""


@contextmanager
def _bounded(num_tensors: int, num_values: int, shown: str, has_weights: bool) -> Iterator[None]:
    """Inside, stop the building of a model that has many more parameters or modules than a file has."""
    counts = {'tensors': 0, 'values': 0, 'modules': 0}

    def count_parameter(module: nn.Module, name: str, parameter: Any) -> None:
        counts['tensors'] += 1
        counts['values'] += 0 if parameter is None else parameter.numel()
        if counts['tensors'] > num_tensors or counts['values'] > num_values:
            raise _TooLarge

    def count_module(module: nn.Module, name: str, child: Any) -> None:
        counts['modules'] += 1
        if counts['modules'] > 10 * num_tensors:
            raise _TooLarge

    hooks = [on_parameter(count_parameter), on_module(count_module)]
    try:
        yield
    except _TooLarge:
        raise UserError(f"'{shown}': its config.json asks for a much larger model than " + (
            'its weights are; it does not belong to them, or it is damaged.' if has_weights else
            f'can be built: up to {num_values:,} parameters (limits.model_parameters) in {num_tensors:,} tensors.')
            ) from None
    finally:
        for hook in hooks:
            hook.remove()


def check_types(cls: Any, config: Mapping[str, Any], source: str) -> None:
    """Check the settings of a class of diffusers by its signature, and that all numbers are finite.

    Args:
        cls: a model or scheduler; of other libraries only numbers are checked, as they check types themselves.

    Raises:
        UserError: names the first setting that does not fit.
    """
    import diffusers
    parameters = (accepted(cls) or {}) if issubclass(cls, diffusers.ConfigMixin) else {}
    is_scheduler = issubclass(cls, diffusers.SchedulerMixin)
    for key, value in config.items():
        parameter = parameters.get(key)
        if not is_scheduler and not _is_finite(value):
            raise UserError(f"'{source}' has {key}={value!r}, which is not a finite number.")
        if parameter is not None and not key.startswith('_') and not _fits(value, parameter):
            raise UserError(f"'{source}' has {key}={_shortened(value)}, which {cls.__name__} does not take.")


def check_scheduler(config: Mapping[str, Any], source: str) -> None:
    """Check a scheduler's settings, by its own class of diffusers or else by the one that all share their names with.

    Raises:
        UserError: a setting has a wrong type, or there are more than MAX_TIMESTEPS.
    """
    import diffusers
    cls = getattr(diffusers, str(config.get('_class_name')), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        cls = diffusers.EulerDiscreteScheduler
    check_types(cls, config, source)
    steps = config.get('num_train_timesteps', 1000)
    if not 0 < steps <= MAX_TIMESTEPS:
        raise UserError(f"'{source}' has num_train_timesteps={steps}; it must be from 1 to {MAX_TIMESTEPS:,}.")


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | dict):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f'{text[:77]}...'


def _fits(value: Any, parameter: inspect.Parameter) -> bool:
    """Whether a setting has a type that its annotation or its default has.

    diffusers annotates loosely: `tuple[int]` stands for any length, and old configs have null for many a False.
    """
    scalars, has_list = _types(parameter.annotation)
    if parameter.annotation is inspect.Parameter.empty or Any in scalars:
        return True
    if value is None:
        return bool({type(None), bool} & scalars) or parameter.default is None
    if isinstance(value, list | tuple):
        return has_list and all(_fits(part, parameter) for part in value)
    if isinstance(value, bool):
        return bool in scalars
    if isinstance(value, int | float):
        return float in scalars or int in scalars and float(value).is_integer()
    return type(value) in scalars


def _types(hint: Any) -> tuple[set[Any], bool]:
    """Return the scalar types that an annotation admits, also in lists, and whether it admits a list."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return {type(argument) for argument in arguments}, False
    if kind in (Union, UnionType):
        parts = [_types(argument) for argument in arguments]
        return set().union(*(scalars for scalars, _ in parts)), any(is_list for _, is_list in parts)
    if getattr(kind, '__name__', '') == 'ndarray':
        return {int, float}, True
    if kind in (list, tuple, Sequence):
        parts = [_types(argument) for argument in arguments if argument is not ...]
        return set().union(*(scalars for scalars, _ in parts)) if parts else {int, float, str}, True
    return {kind if isinstance(kind, type) else Any}, False
