"""The guard of the first steps: faults that trainers had in public are found within three steps that count.

Each fault is put into a tiny training; the words of the error are checked. Where a thread of a public tracker describes
it, it stands beside.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import kinds
import pytest
import torch
from faults import FAULTS, LORA, T2I, TRANSFORMS, WORD, Fault, never_read, rounded, stale_average
from kinds import CASES, ENCODER
from parity import PROMPTS, picture_batch
from runs import DeathError, build, train

from diffengine_sdxl import rng
from diffengine_sdxl.engine.effect import relative_effects
from diffengine_sdxl.engine.hooks import first_steps
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import draw_circle, write_tiny_image_encoder

SEEDS = [4, 2]


@pytest.fixture(scope='module')
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_image_encoder(tmp_path_factory.mktemp('encoder') / 'image_encoder')


@pytest.mark.parametrize(('fault', 'adapter', 'words'), FAULTS)
def test_a_fault_is_found(fault: Fault, adapter: dict[str, Any], words: str, tmp_path: Path, tiny: dict[str, Any],
                          encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within three steps, with the name of what does not train; nothing is exported."""
    config = {k: str(encoder) if v == ENCODER else v for k, v in adapter.items()}
    options = {**tiny, 'model.adapters': dict(_delete_=True, a=config), 'train_cfg.max_iters': 5,
               'train_dataloader.dataset.transforms': TRANSFORMS, 'default_hooks.checkpoint.interval': 4}
    if fault is stale_average:
        options['custom_hooks+'] = [dict(type='EMAHook', decay=0.9)]
    if fault is rounded:
        options['optim_wrapper.optimizer.lr'] = 1e-9
    if fault is never_read:
        monkeypatch.setattr(SDXL, 'never_read', lambda *_: False)
    runner = build(tmp_path / 'run', options)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    fault(runner, monkeypatch)
    with pytest.raises(UserError, match=r'Training stopped at step [1-4]: ') as error:
        runner.train()
    assert words in str(error.value) and 'default_hooks.first_steps=None' in str(error.value)
    assert not list((tmp_path / 'run').glob('step*'))


def run_quietly(folder: Path, tiny: dict[str, Any], capfd: pytest.CaptureFixture[str], **options: Any) -> list[str]:
    """Train; return the lines of the guard."""
    train(folder, {**tiny, 'default_hooks.checkpoint.interval': 100, 'default_hooks.checkpoint.export': False, **{
        key.replace('__', '.'): value for key, value in options.items()}})
    return [line.partition(' - INFO - ')[2] for line in capfd.readouterr().out.splitlines() if 'first steps' in line]


def test_a_warmup_only_delays(tmp_path: Path, tiny: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    """The first step of a warmup has a learning rate of 0; one line says what was found, and how strong it is."""
    lines = run_quietly(tmp_path, tiny, capfd, train_cfg__max_iters=5, param_scheduler__name='linear',
                        param_scheduler__num_warmup_steps=3, default_hooks__logger__interval=1)
    assert len(lines) == 1 and re.match(r"The first steps train all of 'adapter' \(\d+ tensors, effect 0?\.\d+ of the "
                                        r'output\)\.', lines[0]), lines


@pytest.mark.parametrize('options', [
    {'model.adapters.adapter.active_range': (0.6, 1.0)},
    {'train_dataloader.dataset.transforms': [*TRANSFORMS[1:3], dict(type='JointDrop', adapters=['adapter'], image=0.7,
                                                                    text=0.0, both=0.0), *TRANSFORMS[3:]]}],
    ids=['active_range', 'drop'])
def test_steps_without_input_do_not_count(options: dict[str, Any], tmp_path: Path, tiny: dict[str, Any],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Most rows leave nothing to learn; no alarm, and a fault is found where the third row has something."""
    counted: list[int] = []
    check = first_steps._check_watched

    def noted(trained: Any, runner: Any) -> None:
        counted.append(runner.iter + 1)
        check(trained, runner)
        raise DeathError
    monkeypatch.setattr(first_steps, '_check_watched', noted)
    run = {**tiny, **options, 'train_cfg.max_iters': 30, 'train_dataloader.batch_size': 1,
           'default_hooks.checkpoint': None}
    train(tmp_path / 'well', run)
    assert len(counted) == 1 and 4 < counted[0] < 30
    runner = build(tmp_path / 'ill', run)
    net = runner.bare_model.adapters['adapter'].net
    monkeypatch.setattr(net, 'forward', lambda *a, f=net.forward: [x if i else x.detach() for i, x in enumerate(f(*a))])
    # The first feature alone needs no layer of its own.
    monkeypatch.setattr(net.adapter.body[0], 'forward', torch.no_grad()(net.adapter.body[0].forward))
    with pytest.raises(UserError, match=f'stopped at step {counted[0]}: .* had no gradient'):
        runner.train()


@pytest.mark.parametrize(('kind', 'options'), [
    ('lora', {'mixed_precision': 'bf16', 'param_scheduler.num_warmup_steps': 500}),
    ('loha', {'mixed_precision': 'bf16', 'param_scheduler.num_warmup_steps': 500, 'resolution': 32}),
    ('oft', {'mixed_precision': 'bf16', 'param_scheduler.num_warmup_steps': 500}),
    ('controlnet', {'mixed_precision': 'fp16', 'optim_wrapper.optimizer.lr': 1e-5})], ids=str)
def test_no_alarm_where_half_precision_rounds(kind: str, options: dict[str, Any], tmp_path: Path, tiny: dict[str, Any],
                                              capfd: pytest.CaptureFixture[str]) -> None:
    """Effects and gradients that are rounded to zero: a warmup in bf16, zero convolutions in fp16, a single token."""
    run = {**tiny, 'resolution': 64, 'optim_wrapper.optimizer.lr': 1e-4, 'train_cfg.max_iters': 5,
           'default_hooks.checkpoint': None, 'model.adapters': dict(_delete_=True, a=CASES[kind].config), **options}
    if 'param_scheduler.num_warmup_steps' in options:
        run['param_scheduler.name'] = 'constant_with_warmup'
    train(tmp_path, run)
    assert 'The first steps train all of' in capfd.readouterr().out


def test_short_trainings_say_what_had_nothing_to_learn(tmp_path: Path, tiny: dict[str, Any],
                                                       capfd: pytest.CaptureFixture[str]) -> None:
    """Whose input is dropped in every row stays as it was, and a warning says so at the end."""
    train(tmp_path, {**tiny, 'default_hooks.checkpoint': None, 'train_dataloader.dataset.transforms': [
        *TRANSFORMS[1:3], dict(type='JointDrop', adapters=['adapter'], image=1.0, text=0.0, both=0.0),
        *TRANSFORMS[3:]]})
    assert "'adapter' had nothing to learn in 4 steps" in capfd.readouterr().out


def test_processes_that_differ(tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two processes trains for itself: DDP was not used."""
    monkeypatch.setattr(first_steps, 'get_world_size', lambda: 2)
    monkeypatch.setattr(first_steps, 'all_gather', lambda sums: [sums, sums + torch.eye(len(sums))[1] * 1e-9])
    with pytest.raises(UserError, match='step 3: process 1 holds other weights than process 0 in 1 tensors'):
        train(tmp_path, tiny)


def test_effects(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of the change of the denoiser's output; mode, scales and flags are as before."""
    model = kinds.shaken(kinds.build(tiny_base, {'a': T2I, 'b': LORA}), CASES['t2i_adapter'], CASES['lora']).train()
    batch = picture_batch(PROMPTS, SEEDS, conditions=kinds.conditions(T2I))
    batch.img, batch.drop = torch.zeros(2, 3, 64, 64), {'a': torch.tensor([True, True])}
    flags = [p.requires_grad for p in model.parameters()]
    found = relative_effects(model, batch)
    assert model.training and flags == [p.requires_grad for p in model.parameters()]
    assert (model.adapters['a'].scale, model.adapters['b'].scale) == (1.0, 1.0) and batch.drop['a'].all()
    model.eval()
    x = torch.randn(1, 4, 8, 8, generator=rng.generator('effect'))

    def predict() -> torch.Tensor:
        with torch.no_grad(), model.frozen():
            both = model.encode(replace(batch, drop={}), project=True).rows(slice(0, 1))
            return model.predict(x, torch.tensor(499), both, torch.full((1, 2), 0.5))
    whole = predict()
    for name, adapter in model.adapters.items():
        adapter.scale = 0.0
        assert found[name] > 0
        assert found[name] == pytest.approx(float((whole - predict()).norm() / whole.norm()), rel=1e-5)
        adapter.scale = 1.0


def write_captions(folder: Path, captions: list[str]) -> Path:
    """Write a folder of images with these captions."""
    folder.mkdir()
    for i, caption in enumerate(captions):
        draw_circle(i)[0].save(folder / f'{i}.png')
        (folder / f'{i}.txt').write_text(caption)
    return folder


@pytest.mark.parametrize(('captions', 'prefix', 'words'), [
    (['a red thing', 'a thing'], None, "None of the 2 captions has 'circle' of adapter 'a'"),
    (['red ' * 90 + 'circle'] * 2, None, 'all of them after the 77 tokens'),
    (['a circle', 'a CIRCLE', 'a thing', 'red ' * 90 + 'circle'], None, '2 of 4 captions have'),
    (['a red thing', 'a thing'], 'circle, ', None), (['a circle', 'the circle'], None, None)])
def test_captions_without_the_word(captions: list[str], prefix: str | None, words: str | None, tmp_path: Path,
                                   tiny: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    """Refused before the first step if no caption has it where it is read; counted if some lack it."""
    transforms = [*([dict(type='CaptionPrefix', prefix=prefix)] if prefix else []), *TRANSFORMS[1:]]
    options = {**tiny, 'model.adapters': dict(_delete_=True, a={**WORD, 'num_vectors': 1}), 'train_cfg.max_iters': 1,
               'train_dataloader.dataset': dict(_delete_=True, type='CaptionFolder', transforms=transforms,
                                                source=str(write_captions(tmp_path / 'data', captions))),
               'default_hooks.checkpoint': None}
    if words is None or words.startswith('2 of 4'):
        train(tmp_path / 'run', options)
        said = capfd.readouterr().out
        assert ('captions have' in said) == (words is not None) and (words or '') in said
        assert words is None or "in 1 more it stands after the 77 tokens" in said
        return
    with pytest.raises(UserError, match=re.escape(words)):
        train(tmp_path / 'run', options)
    assert not list((tmp_path / 'run').glob('step*'))
