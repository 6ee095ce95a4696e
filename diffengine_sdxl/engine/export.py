"""Export adapters in their ecosystems' formats, a fine-tuned base as a diffusers folder, and a manifest."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffengine_sdxl import atomic_files
from diffengine_sdxl.adapters.base import Adapter
from diffengine_sdxl.adapters.formats import modelspec
from diffengine_sdxl.config.references import to_plain
from diffengine_sdxl.engine.eval_images import weights_digests
from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError, listed
from diffengine_sdxl.loading import base as loading
from diffengine_sdxl.loading import hub
from diffengine_sdxl.loading.trained import PIPELINE
from diffengine_sdxl.models.diffusers_pipeline import save_pipeline, without_wrappers
from diffengine_sdxl.models.generate import BASE
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.versions import git_commit, versions


def export(runner: ExperimentRunner, folder: Path, step: int, metadata: Mapping[str, str] | None = None) -> None:
    """Write what trains to `folder`, in the main process, whole or not at all; read it back and compare.

    Args:
        metadata: of the headers of its files, beside and before `modelspec.of_export`.

    Raises:
        UserError: it cannot be written, or differs when read back.
    """
    on_main_process(lambda: _export(runner, folder, step, metadata or {}))


def _export(runner: ExperimentRunner, folder: Path, step: int, metadata: Mapping[str, str]) -> None:
    model = runner.bare_model
    trainables = model.trainables()
    adapters = {name: adapter for name, adapter in model.adapters.items() if name in trainables}
    contents = [*adapters, *([PIPELINE] if model.trainable_parts else [])]
    with atomic_files.replacing(folder) as temporary:
        temporary.mkdir()
        for name, adapter in adapters.items():
            adapter.save(temporary / name)
            modelspec.stamp(temporary / name, {**_fields(runner, name, step), **metadata})
            _check_adapter(adapter, trainables[name], temporary / name)
        if model.trainable_parts:
            save_pipeline(model, temporary / PIPELINE)
            modelspec.stamp(temporary / PIPELINE, {**_fields(runner, None, step), **metadata})
            _check_pipeline(model, temporary / PIPELINE)
        (temporary / 'manifest.json').write_text(json.dumps(manifest(runner, step, contents), indent=1) + '\n')


def _fields(runner: ExperimentRunner, name: str | None, step: int) -> dict[str, str]:
    """Return what the header says of adapter `name`, or of the base."""
    model = runner.bare_model
    adapter = None if name is None else model.adapters[name]
    title = f'{Path(runner.work_dir).name}{"" if name is None else f" {name}"}, step {step}'
    return modelspec.of_export(runner.resolved, None if adapter is None else type(adapter).__name__, title,
                               model.schedule.prediction_type, adapter.new_tokens() if adapter is not None else ())


@torch.no_grad()
def _check_adapter(adapter: Adapter, parameters: list[tuple[str, nn.Parameter]], folder: Path) -> None:
    """Check that the exported file, loaded over zeros, gives the same weights bitwise.

    Raises:
        UserError: it does not.
    """
    saved = [(name, parameter, parameter.detach().to('cpu', copy=True)) for name, parameter in parameters]
    try:
        for _, parameter, _ in saved:
            parameter.zero_()
        adapter.load(folder)
        changed = [name for name, parameter, value in saved if not torch.equal(parameter.cpu(), value)]
    finally:
        for _, parameter, value in saved:
            parameter.copy_(value)
    if changed:
        raise UserError(f"'{folder}': {len(changed)} of {len(saved)} weights differ when read back: "
                        f'{listed(changed, 5)}.')


def _check_pipeline(model: SDXL, folder: Path) -> None:
    dtypes = {part: getattr(model, part).dtype for part in loading.MODULES if getattr(model, part) is not None}
    components = loading.load_components(str(folder), None, None, None, dtypes, 0)
    for part in dtypes:
        with without_wrappers(model):
            state = getattr(model, part).state_dict()
        for key, value in components[part].state_dict().items():
            if not torch.equal(value, state[key].cpu()):
                raise UserError(f"'{folder}/{part}': {key} differs when read back.")


def manifest(runner: ExperimentRunner, step: int, contents: list[str]) -> dict[str, Any]:
    """Return what an export was made from: base, data set, resolved config and speed, versions, seed, commit, step.

    `weights` are the digests of what it holds, by which a test of it is known.
    """
    config = to_plain(runner.resolved)
    config.pop('visualizer', None)  # tracker settings may contain account names
    model = config.get('model') or {}
    dataset: Any = runner.train_dataloader.dataset
    trained = [BASE if name == PIPELINE else name for name in contents]
    return {'step': step, 'max_iters': runner.max_iters, 'contents': contents,
            'weights': weights_digests(runner.bare_model, trained), 'ema': runner.ema is not None, 'seed': runner.seed,
            'speed': asdict(runner.speed), 'measured': runner.measured,
            'base': {key: model.get(key) for key in ('pretrained', 'unet', 'vae', 'revision', 'variant')},
            'dataset': (config.get('train_dataloader') or {}).get('dataset'),
            'rows': len(dataset) if hasattr(dataset, '__len__') else None, 'hub': sorted(set(_on_hub(config))),
            'command': _command(),
            'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()), 'git_commit': git_commit(),
            'versions': versions(), 'config': config}


#: Keys whose value is a file, a folder, or an id of the hub.
_SOURCES = ('pretrained', 'unet', 'vae', 'tokenizer', 'source', 'weights', 'image_encoder', 'model', 'processor',
            'detector')


def _on_hub(node: Any, key: str = '') -> Iterator[str]:
    """Yield the sources in a config that are ids of the hub, not files here: only these are for others to know."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _on_hub(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from _on_hub(value, key)
    elif key in _SOURCES and isinstance(node, str) and '/' in node:
        with suppress(UserError):  # a file that is gone, or a link
            if hub.local_path(node) is None:
                yield node


def _command() -> str | None:
    """Return the command line of this training; None if it was started from Python."""
    program, *arguments = sys.argv
    if Path(program).name in ('diffengine-sdxl', '__main__.py') and arguments[:1] == ['train']:
        arguments = arguments[1:]
    elif Path(program).name != 'train.py':
        return None
    # As in the config: tracker settings may contain account names. A launcher adds its processes' ranks.
    kept = [text for text in arguments
            if not text.startswith(('visualizer.', 'visualizer=', '--cfg-options=visualizer', '--local-rank',
                                    '--local_rank'))]
    return shlex.join(['diffengine-sdxl', 'train', *kept])
