"""Draws in the loader's workers are bitwise the step's own; batches are copied ahead, and errors keep their turn."""

import contextlib
import functools
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from diffengine_sdxl import rng
from diffengine_sdxl.datasets import KeyedSampler, PriorPreservation, Shapes, collate
from diffengine_sdxl.engine.prefetch import CopiedAhead, DrawingCollate, ahead, draw_in_workers
from diffengine_sdxl.models.sdxl import SDXL

SHAPES = dict(type='Shapes', size=64, transforms=[dict(type='ComputeTimeIds'), dict(type='PackInputs')])
NOISE = dict(type='InputPerturbation', inner=dict(type='PyramidNoise', inner=dict(type='OffsetNoise')))
OBJECTIVES = {'denoise': dict(type='Denoise', noise=NOISE, timesteps=dict(type='CubicTimesteps')),
              'reconstruct': dict(type='Reconstruct')}


@pytest.mark.parametrize('kind', OBJECTIVES)
@torch.no_grad()
def test_losses_are_those_of_draws_in_the_step(kind: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a worker, for rows of two samples; the step then draws nothing."""
    model = SDXL(pretrained=str(tiny_base), trainable=['vae'] if kind == 'reconstruct' else [],
                 objective=OBJECTIVES[kind])
    data: Any = PriorPreservation(SHAPES, {**SHAPES, 'split': 'prior'})
    loader: Any = DataLoader(data, 1, sampler=KeyedSampler(data, seed=3), collate_fn=collate, num_workers=1)
    drawn_in_step = model.data_preprocessor(next(iter(loader)))['inputs']
    draw_in_workers(loader, model)
    batch = model.data_preprocessor(next(iter(loader)))['inputs']
    assert not drawn_in_step.drawn and batch.drawn and len(batch) == 2
    used: dict[str, torch.Tensor] = {}

    def noted(name: str, method: Any, x0: Any, noise: Any, t: Any) -> Any:
        used.setdefault(name, noise)
        return method(x0, noise, t)
    for name in ('add_noise', 'target'):
        monkeypatch.setattr(model.schedule, name, functools.partial(noted, name, getattr(model.schedule, name)))
    losses = model(drawn_in_step, mode='loss')
    assert kind == 'reconstruct' or (torch.equal(used['add_noise'], batch.drawn['noise_in'])
                                     and torch.equal(used['target'], batch.drawn['noise']))
    other = model(replace(batch, drawn={}, epoch=batch.epoch + 1), mode='loss')
    monkeypatch.setattr(rng.Draws, '__init__', None)
    assert {name: float(loss) for name, loss in model(batch, mode='loss').items()} == {
        name: float(loss) for name, loss in losses.items()}
    assert all(not torch.equal(other[name], loss) for name, loss in losses.items() if name != 'loss_kl')


def test_what_is_drawn(tiny_base: Path) -> None:
    """No VAE's noise for latents; nothing for what the model refuses; the copy of a spawned worker draws the same."""
    model = SDXL(pretrained=str(tiny_base), objective=OBJECTIVES['denoise'])
    model.schedule.alpha_bar(torch.tensor([1], device='meta'))
    sample = Shapes(**{k: v for k, v in SHAPES.items() if k != 'type'})[0]
    draw = DrawingCollate(collate, model)
    drawn, copy = draw([sample])['drawn'], pickle.loads(pickle.dumps(draw))
    assert set(drawn) == {'noise', 'noise_in', 'timestep', 'vae'} and drawn['vae'].shape == (1, 4, 8, 8)
    assert not copy.schedule._moved and all(torch.equal(drawn[k], v) for k, v in copy([sample])['drawn'].items())
    cached = draw([{**{k: v for k, v in sample.items() if k != 'img'}, 'latents': torch.zeros(4, 16, 8)}])['drawn']
    assert set(cached) == {'noise', 'noise_in', 'timestep'} and cached['noise'].shape == (1, 4, 16, 8)
    assert torch.equal(cached['timestep'], drawn['timestep'])
    for missing in ('img', 'seed'):
        assert 'drawn' not in draw([{k: v for k, v in sample.items() if k != missing}])
    loader: Any = DataLoader([0], collate_fn=collate)
    draw_in_workers(loader, SimpleNamespace(objective=None))
    assert loader.collate_fn is collate


def test_batches_are_copied_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `meta` as the device and streams that only take notes."""
    notes: list[str] = []
    side = SimpleNamespace()
    main = SimpleNamespace(wait_stream=lambda stream: notes.append('wait') if stream is side else None)

    @contextlib.contextmanager
    def inside(stream: Any) -> Iterator[None]:
        notes.append('copy')
        yield
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: side)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: main)
    monkeypatch.setattr(torch.cuda, 'stream', inside)
    monkeypatch.setattr(torch.Tensor, 'record_stream', lambda tensor, stream: notes.append(f'keep {tensor.dim()}'))

    def batches() -> Iterator[dict[str, Any]]:
        for number in range(2):
            yield {'img': torch.zeros(2, 3, 8, 8).byte(), 'text': [str(number)], 'seed': torch.tensor([1, 2]),
                   'drawn': {'noise': torch.zeros(2, 4), 'timestep': torch.tensor([3, 4])}}
        raise ValueError('the third')
    plain = batches()
    assert ahead(plain, torch.device('cpu')) is plain
    copied = CopiedAhead(batches(), torch.device('meta'))
    first = next(copied)
    assert notes == ['copy', 'wait', 'keep 4', 'keep 2', 'copy'] and first['text'] == ['0']
    assert first['img'].is_meta and first['img'].dtype == torch.uint8 and first['drawn']['noise'].is_meta
    assert first['seed'].tolist() == [1, 2] and first['drawn']['timestep'].tolist() == [3, 4]
    assert next(copied)['text'] == ['1']
    with pytest.raises(ValueError, match='the third'):
        next(copied)
    assert list(CopiedAhead(iter([]), torch.device('meta'))) == []
