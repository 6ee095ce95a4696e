"""Weights that a training wrote: find a checkpoint or export by the name that a user gives, and load it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from mmengine.config import Config
from torch import nn

from diffengine_sdxl.errors import UserError, did_you_mean, error_prefix, listed
from diffengine_sdxl.loading import checkpoint
from diffengine_sdxl.loading.files import read_json
from diffengine_sdxl.loading.weights import check_finite

#: Name of a fine-tuned base's folder in an export, beside those of the adapters.
PIPELINE = 'pipeline'
#: In place of a checkpoint's name: the base without adapters; or the adapters with the `weights` in the config.
NONE, WEIGHTS = 'none', 'weights'
#: The last part of a checkpoint's name that stands for the step that CheckpointHook(keep_best=...) found best.
BEST = 'best'


class TrainableModel(checkpoint.Stateful, Protocol):
    """What loading uses of an SDXL."""

    @property
    def adapters(self) -> Mapping[str, Any]:
        """Return its adapters by name."""

    def trainables(self) -> Mapping[str, Iterable[tuple[str, nn.Parameter]]]:
        """Return what trains: name of a component or adapter -> its parameters with their full names."""


def apply_weights(config: Config, name: str | None) -> Path | None:
    """Return the file or folder of weights to load into the model of `config`, if there is one.

    Args:
        config: changed in place if `name` replaces the base or removes the adapters.
        name: as of `to_test_config`; None for 'weights'.

    Raises:
        UserError: it does not exist or has other adapters, or the config names no weights of an adapter.
    """
    if name == NONE:
        config.model.adapters = dict.fromkeys(config.model.get('adapters') or {})
        return None
    if name is None or name == WEIGHTS:
        adapters = {key: adapter for key, adapter in (config.model.get('adapters') or {}).items() if adapter}
        fresh = [key for key, adapter in adapters.items() if not adapter.get('weights')]
        if fresh:
            raise UserError(f"The config does not name the `weights` of {', '.join(fresh)}; set them "
                            f'(model.adapters.{fresh[0]}.weights), or name a checkpoint or export that has them.')
        return None
    path = resolve_checkpoint(name)
    check_same_adapters(config.model, path)
    manifest = read_manifest(path) if path.is_dir() else None
    parent = read_manifest(path.parent) if manifest is None and path.is_dir() else None
    if parent is not None and PIPELINE in parent['contents']:
        raise UserError(f"'{name}' was trained together with its base; name '{path.parent}', which has both.")
    if manifest is not None and PIPELINE in manifest['contents']:
        use_trained_base(config.model, path)
    return path


def check_same_adapters(model_config: Mapping[str, Any], path: Path) -> None:
    """Check that the adapters that a config trains are those whose weights a checkpoint or an export has.

    Args:
        model_config: `model` of a config.
        path: as `resolve_checkpoint` returns it. Of a folder without a manifest only the loading shows what it has.

    Raises:
        UserError: they have other names or types; both are listed. Or a checkpoint cannot be read.
    """
    wanted = _trained_types(model_config)
    if path.is_file():
        found = _trained_types(checkpoint.load(path, mmap=True)['meta']['identity'].get('model'))
    elif (manifest := read_manifest(path)) is not None:
        found = _trained_types((manifest.get('config') or {}).get('model'))
    else:  # the folder of one adapter; if the config has only one, that takes it whatever its name is
        manifest = read_manifest(path.parent) or {}
        found = _trained_types((manifest.get('config') or {}).get('model'))
        found = {name: kind for name, kind in found.items() if name == path.name}
        wanted = wanted if len(wanted) == 1 else {name: kind for name, kind in wanted.items() if name in found}
        if [*found.values()] == [*wanted.values()]:
            return
    if found and wanted and found != wanted:
        had, wants = (listed(f"{kind} '{name}'" for name, kind in kinds.items()) for kinds in (found, wanted))
        raise UserError(f"'{path}' has the weights of {had}, and the config trains {wants}. Use the config that they "
                        'were trained with.')


def _trained_types(model_config: Any) -> dict[str, str]:
    """Return the type of each adapter that a model's config trains; {} if it is no such config."""
    adapters = model_config.get('adapters') if isinstance(model_config, Mapping) else None
    return {str(name): str(adapter.get('type')) for name, adapter in sorted((adapters or {}).items())
            if isinstance(adapter, Mapping) and adapter.get('trainable', True)}


def use_exported(config: Config, name: str | None) -> str | None:
    """Let frozen adapters of `config` be those that a training exported, in place of the `weights` that it names.

    Args:
        config: changed in place.
        name: see `apply_weights`.

    Returns:
        `name`, or None if nothing else is to be loaded from there.

    Raises:
        UserError: it does not exist.
    """
    if name in (None, NONE, WEIGHTS):
        return name
    path = resolve_checkpoint(str(name))
    export = path.with_suffix('') if path.is_file() else path
    # The folder of one adapter lies in that of a step.
    export, names = (export, None) if (export / 'manifest.json').is_file() else (export.parent, [export.name])
    manifest = read_manifest(export) if export.is_dir() else None
    contents = [one for one in (manifest or {}).get('contents', ()) if names is None or one in names]
    adapters = config.model.get('adapters') or {}
    if not contents or any((adapters.get(one) or {}).get('trainable', True) for one in contents):
        return name
    for one in contents:
        adapters[one].update({**dict.fromkeys(adapters[one].keys() & {'subfolder', 'weight_name', 'revision'}),
                              'weights': str(export / one)})
    return None


def use_trained_base(model_config: Any, export: Path) -> None:
    """Replace base and VAE in a model's config by the base that was trained."""
    model_config.update(pretrained=str(export / PIPELINE), unet=None, vae=None, revision=None, variant=None)


def resolve_checkpoint(name: str) -> Path:
    """Return the checkpoint's file, or the exported folder, that `name` stands for.

    Raises:
        UserError: it does not exist; the nearest names.
    """
    path = Path(name)
    if path.name == BEST and (path.parent / f'{BEST}.json').is_file():
        return _best(path.parent)
    if path.is_file():
        return path
    if not path.exists():
        if path.name == BEST and path.parent.is_dir():
            raise UserError(f"'{path.parent}' has no {BEST}.json, which says what step is the best: train with "
                            'default_hooks.checkpoint.keep_best=METRIC (docs/stopping.md), or name a checkpoint.')
        names = [p.name for p in checkpoint.list_checkpoints(path.parent)]
        raise UserError(f"There is no checkpoint '{name}'.{did_you_mean(path.name, names)} Name a step<N>.pth, a "
                        f"work_dir, its {BEST} ('W/{BEST}'), an exported folder, '{NONE}' for the base alone, or "
                        f"'{WEIGHTS}' for those in the config.")
    if (latest := checkpoint.latest(path)) is not None:
        return latest
    if read_manifest(path) is None and not any(path.glob('*.safetensors')):
        raise UserError(f"'{name}' has neither a checkpoint (step<N>.pth) nor an exported adapter.")
    return path


def _best(work_dir: Path) -> Path:
    """Return the best step's checkpoint, or its export where only that is left.

    Raises:
        UserError: `best.json` is damaged, or names a step that is not there.
    """
    record = work_dir / f'{BEST}.json'
    content = read_json(record)
    try:
        path = work_dir / f'step{int(content["step"])}.pth'
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"'{record}' is damaged ({type(error).__name__}: {error}).") from error
    found = next((one for one in (path, path.with_suffix('')) if one.exists()), None)
    if found is None:
        raise UserError(f"'{record}' names step {path.stem[4:]}, and '{path}' is not there. Name another checkpoint.")
    return found


def load_trained(model: TrainableModel, source: str) -> tuple[int | None, bool]:
    """Load the trained weights of a checkpoint (its EMA weights, if it has some) or of an export, strictly.

    Returns:
        Their step, if known, and whether they are EMA weights.

    Raises:
        UserError: the file is damaged or its weights don't fit; which keys.
    """
    if Path(source).is_dir():
        return load_export(model, Path(source))
    state = checkpoint.load(source)
    weights, is_ema = trained_weights(state)
    check_finite(weights.items(), source)
    checkpoint.load_strict(model, weights, source)
    return state['meta']['step'], is_ema


def weights_label(source: str, step: int | None, is_ema: bool) -> str:
    """Return how to name the loaded weights of `source` to people."""
    return f"'{source}'{f', step {step}' if step else ''}{', EMA weights' if is_ema else ''}"


@contextmanager
def other_weights(model: TrainableModel, source: str) -> Iterator[str]:
    """Inside, give the model the trained weights of `source`, see `load_trained`; yield their label.

    Raises:
        UserError: the file is damaged or its weights don't fit; which keys.
    """
    parameters = {id(p): p for named in model.trainables().values() for _, p in named}
    parameters |= {id(p): p for adapter in model.adapters.values() for p in adapter.all_parameters()}
    own = {key: parameter.detach().to('cpu', copy=True) for key, parameter in parameters.items()}
    try:
        yield weights_label(source, *load_trained(model, source))
    finally:
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(own[key])


def trained_weights(state: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return a checkpoint's EMA weights if it has some, else its weights; and whether they are EMA weights."""
    ema = state.get('ema', {}).get('weights')
    return ema or state['state_dict'], bool(ema)


def load_export(model: TrainableModel, folder: Path) -> tuple[int | None, bool]:
    """Load the weights that `engine.export` wrote into `model`.

    Args:
        model: an SDXL with adapters of the same names.
        folder: `step<N>`, or the folder of one adapter in it (or from elsewhere, in its ecosystem's format). A
            fine-tuned base is not loaded from it: set model.pretrained to its folder.

    Returns:
        The step, and whether these are EMA weights; None and False if the folder does not record it.

    Raises:
        UserError: the folder's adapters are not those of the model, or one does not fit.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        name = _only_adapter(model, folder)
        adapter = model.adapters[name]
        with error_prefix(f"'{folder}' does not fit adapter '{name}' ({type(adapter).__name__}): ", unless='fit'):
            adapter.load(folder)
        with suppress(UserError):  # the parent folder may be anybody's
            manifest = read_manifest(folder.parent)
    else:
        trained = [name for name, adapter in model.adapters.items() if adapter.trainables()]
        exported = [name for name in manifest['contents'] if name != PIPELINE]
        if sorted(trained) != sorted(exported):
            raise UserError(f"'{folder}' has the adapters {exported or 'none'}, the config trains "
                            f"{trained or 'none'}; test it with the config that it was trained with.")
        for name in exported:
            model.adapters[name].load(folder / name)
    return (None, False) if manifest is None else (manifest['step'], bool(manifest['ema']))


def _only_adapter(model: TrainableModel, folder: Path) -> str:
    """Return the name of the adapter whose weights are in `folder`, which holds those of one adapter."""
    names = list(model.adapters)
    name = folder.name if folder.name in names else names[0] if len(names) == 1 else None
    if name is None:
        raise UserError(f"'{folder}' is the folder of one adapter, but the config has {len(names)} adapters"
                        f"{' (' + ', '.join(names) + ')' if names else ''} and none is named '{folder.name}'.")
    others = [other for other in names if other != name and model.adapters[other].trainables()]
    if others:
        raise UserError(f"'{folder}' has the weights of '{name}' only, and the config also trains "
                        f'{", ".join(others)}. Name the folder step<N> that has all, or give the others their '
                        '`weights` and trainable=False.')
    return name


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of an export, or None if there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / 'manifest.json'
    if not path.is_file():
        return None
    manifest = read_json(path)
    try:
        return {**manifest, 'step': int(manifest['step']), 'contents': [str(name) for name in manifest['contents']],
                'ema': manifest['ema']}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"'{path}' is damaged ({type(error).__name__}: {error}).") from error
