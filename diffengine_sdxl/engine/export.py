"""Export: every adapter in its ecosystem's format, a fine-tuned base as a diffusers folder, and a manifest."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import broadcast_object_list, is_main_process

from diffengine_sdxl import __version__
from diffengine_sdxl.engine import checkpoint
from diffengine_sdxl.engine.config import to_plain
from diffengine_sdxl.models import loading
from diffengine_sdxl.models.pipeline import save_pipeline, without_wrappers

#: Name of the folder of a fine-tuned base, beside those of the adapters.
PIPELINE = 'pipeline'


def export(runner: Any, folder: Path, step: int) -> None:
    """Write what trains to `folder`, whole or not at all; reloaded and compared before it counts.

    Raises:
        ValueError: it could not be written.
    """
    failed: list[str | None] = [None]
    if is_main_process():
        try:
            _export(runner, folder, step)
        except ValueError as error:
            failed[0] = str(error)
    broadcast_object_list(failed)
    if failed[0] is not None:
        raise ValueError(failed[0])


def _export(runner: Any, folder: Path, step: int) -> None:
    model = runner.bare_model
    owned = model.trainables()
    adapters = {name: adapter for name, adapter in model.adapters.items() if name in owned}
    with checkpoint.replacing(folder) as temporary:
        temporary.mkdir()
        for name, adapter in adapters.items():
            adapter.save(temporary / name)
            _check_reload(adapter, owned[name], temporary / name)
        if model.trainable_parts:
            save_pipeline(model, temporary / PIPELINE)
            _check_pipeline(model, temporary / PIPELINE)
        text = json.dumps(manifest(runner, step, [*adapters, *([PIPELINE] if model.trainable_parts else [])]), indent=1)
        (temporary / 'manifest.json').write_text(text + '\n')


@torch.no_grad()
def _check_reload(adapter: Any, owned: list[tuple[str, torch.nn.Parameter]], folder: Path) -> None:
    """What was written, read back over zeros, must be what we had, bitwise; the weights may live in the UNet.

    Raises:
        ValueError: it is not.
    """
    held = [(name, p, p.detach().to('cpu', copy=True)) for name, p in owned]
    try:
        for _, parameter, _ in held:
            parameter.zero_()
        adapter.load(folder)
        changed = [name for name, parameter, value in held if not torch.equal(parameter.cpu(), value)]
    finally:
        for _, parameter, value in held:
            parameter.copy_(value)
    if changed:
        raise ValueError(f"'{folder}': {len(changed)} of {len(held)} weights changed on their way to the disk: "
                         f'{", ".join(changed[:5])}.')


def load_export(model: Any, folder: Path) -> tuple[int | None, bool]:
    """Read into `model` the weights that `export` wrote.

    Args:
        model: an SDXL with adapters of the same names.
        folder: `step<N>`, or the folder of one adapter in it (or from elsewhere, in its ecosystem's format). A
            fine-tuned base is no part of it: name its folder in model.pretrained.

    Returns:
        The step, and whether these are EMA weights; None and False where the folder does not say so.

    Raises:
        ValueError: there is nothing for an adapter of the model, something for an unknown one, or it does not fit.
    """
    names, notes = list(model.adapters), read_manifest(folder)
    if notes is None:
        name = folder.name if folder.name in names else names[0] if len(names) == 1 else None
        if name is None:
            raise ValueError(f"'{folder}' is the folder of one adapter, but the config has {len(names)} adapters"
                             f"{' (' + ', '.join(names) + ')' if names else ''} and none is named '{folder.name}'.")
        others = [other for other in names if other != name and model.adapters[other].trainables()]
        if others:
            raise ValueError(f"'{folder}' holds the weights of '{name}' only, and the config also trains "
                             f'{", ".join(others)}. Name the folder step<N> that holds all, or give the others their '
                             '`weights` and trainable=False.')
        model.adapters[name].load(folder)
        with suppress(ValueError):  # it need not be ours
            notes = read_manifest(folder.parent)
    else:
        trained = [name for name in names if model.adapters[name].trainables()]
        held = [name for name in notes['contents'] if name != PIPELINE]
        if sorted(trained) != sorted(held):
            raise ValueError(f"'{folder}' holds the adapters {held or 'none'}, the config trains "
                             f"{trained or 'none'}; test it with the config that it was trained with.")
        for name in held:
            model.adapters[name].load(folder / name)
    return (None, False) if notes is None else (notes['step'], bool(notes['ema']))


def load_weights(model: Any, source: str) -> tuple[int | None, bool]:
    """Take the trained weights (the EMA's, if it has one) of a checkpoint, or of an export's folder, strictly.

    Returns:
        The step that they are of, where it is known, and whether they are averages.

    Raises:
        ValueError: the file is damaged or its weights don't fit; which keys.
    """
    if Path(source).is_dir():
        return load_export(model, Path(source))
    state = checkpoint.load(source)
    averages = state.get('ema', {}).get('weights')
    checkpoint.load_strict(model, averages or state['state_dict'], source)
    return state['meta']['step'], bool(averages)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an export, or None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / 'manifest.json'
    if not path.is_file():
        return None
    try:
        notes = json.loads(path.read_text())
        return {**notes, 'step': int(notes['step']), 'contents': list(notes['contents']), 'ema': notes['ema']}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged ({error}).") from error


def _check_pipeline(model: Any, folder: Path) -> None:
    dtypes = {part: getattr(model, part).dtype for part in loading.MODULES if getattr(model, part) is not None}
    parts = loading.load_components(str(folder), None, None, None, dtypes, 0)
    for part in dtypes:
        with without_wrappers(model):
            own = getattr(model, part).state_dict()
        for key, value in parts[part].state_dict().items():
            if not torch.equal(value, own[key].cpu()):
                raise ValueError(f"'{folder}/{part}': {key} changed on its way to the disk.")


def manifest(runner: Any, step: int, contents: list[str]) -> dict[str, Any]:
    """Where an export comes from: base, data, resolved config, versions, seed, git commit, step."""
    config = to_plain(runner.resolved)
    config.pop('visualizer', None)  # trackers' accounts are nobody's business who loads an adapter
    model = config.get('model') or {}
    return {'step': step, 'contents': contents, 'ema': runner.ema is not None, 'seed': runner.seed,
            'base': {key: model.get(key) for key in ('pretrained', 'unet', 'vae', 'revision', 'variant')},
            'dataset': (config.get('train_dataloader') or {}).get('dataset'),
            'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()), 'git_commit': git_commit(),
            'versions': versions(), 'config': config}


def versions() -> dict[str, str]:
    """Of this package and of those that determine its numbers; torch's with its build, such as '2.14.1+cu130'."""
    # torch's metadata leave out the build where it comes from PyPI.
    names = ('diffusers', 'transformers', 'peft', 'mmengine', 'datasets')
    return {'diffengine_sdxl': __version__, 'torch': torch.__version__,
            **{n: importlib.metadata.version(n) for n in names}}


def git_commit() -> str | None:
    """The commit of the folder that the command was run in, with '-dirty' if it has changes; None outside git."""
    try:
        commit = subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True, timeout=5)
        if commit.returncode != 0:
            return None
        changes = subprocess.run(['git', 'status', '--porcelain', '-uno'], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ('-dirty' if changes.stdout.strip() else '')
