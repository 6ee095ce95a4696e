"""Hooks: averages, sample images, curves, events, progress."""

import json
import logging
import os
import pty
import re
import select
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from parity import make_batch
from PIL import Image
from runs import build, curves, evaluation, train, weights

from diffengine_sdxl.engine.eval_images import weights_digests
from diffengine_sdxl.engine.hooks.progress import ProgressHook
from diffengine_sdxl.engine.hooks.samples import SampleHook
from diffengine_sdxl.engine.hooks.step_grid import StepGrid
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.images import labelled_grid, to_pil
from diffengine_sdxl.models.request_batch import read_image_input, request_batch
from diffengine_sdxl.request import Request
from diffengine_sdxl.structures import Batch


class WeightRecorder(Hook):
    """Copy the trained weights after each step, before any other hook."""

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def copy(self, runner: Any) -> None:
        self.steps.append({k: v.clone() for k, v in runner.model.state_dict().items()})

    def before_train(self, runner: Any) -> None:
        self.copy(runner)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.copy(runner)


@pytest.mark.parametrize('warmup', [True, False])
def test_the_average_is_that_of_a_loop(warmup: bool, tmp_path: Path, tiny: dict[str, Any]) -> None:
    """average + (1 - d) (weight - average), step by step in fp64; it is what is exported, and the manifest says so;
    training goes on with the weights themselves."""
    runner = build(tmp_path, {**tiny, 'custom_hooks': [dict(type='EMAHook', decay=0.7, warmup=warmup)]})
    watch = WeightRecorder()
    runner.register_hook(watch)
    runner.train()
    first, *steps = watch.steps
    average = {k: v.double() for k, v in first.items()}
    for step, current in enumerate(steps, start=1):
        decay = min(0.7, (1 + step) / (10 + step)) if warmup else 0.7
        average = {k: a + (1 - decay) * (current[k].double() - a) for k, a in average.items()}
    state = torch.load(tmp_path / 'step4.pth', weights_only=True)
    for key, expected in average.items():
        torch.testing.assert_close(state['ema']['weights'][key].double(), expected, rtol=0, atol=1e-7)
        assert torch.equal(state['state_dict'][key], steps[-1][key])
    assert any(not torch.equal(v, state['state_dict'][k]) for k, v in state['ema']['weights'].items())
    from safetensors.torch import load_file
    exported = load_file(tmp_path / 'step4' / 'adapter' / 'diffusion_pytorch_model.safetensors')
    assert all(torch.equal(v, state['ema']['weights'][f'adapters.adapter.net.{k}']) for k, v in exported.items())
    manifest = json.loads((tmp_path / 'step4' / 'manifest.json').read_text())
    assert manifest['ema'] is True and manifest['weights'] != weights_digests(runner.model, ['adapter'])
    with runner.exported_weights():
        assert manifest['weights'] == weights_digests(runner.model, ['adapter'])


def test_without_an_average_the_weights_are_exported(tmp_path: Path, tiny: dict[str, Any]) -> None:
    train(tmp_path, tiny)
    from safetensors.torch import load_file
    exported = load_file(tmp_path / 'step4' / 'adapter' / 'diffusion_pytorch_model.safetensors')
    assert all(torch.equal(v, exported[k.removeprefix('adapters.adapter.net.')])
               for k, v in weights(tmp_path, 4).items())
    assert json.loads((tmp_path / 'step4' / 'manifest.json').read_text())['ema'] is False


@pytest.mark.parametrize(('interval', 'saved'), [(3, [3, 4]), (None, [4])])
def test_checkpoints_at_the_interval_and_at_the_end(interval: int | None, saved: list[int], tmp_path: Path,
                                                    tiny: dict[str, Any]) -> None:
    train(tmp_path, {**tiny, 'default_hooks.checkpoint.interval': interval, 'default_hooks.checkpoint.export': False})
    assert sorted(p.name for p in tmp_path.glob('step*')) == [f'step{s}.pth' for s in saved]


def sample_options(tiny: dict[str, Any], **changes: Any) -> dict[str, Any]:
    del tiny['default_hooks.samples']
    hook = dict(_delete_=True, type='SampleHook', interval=4, size=32, num_images=2, seed=5, **changes)
    return {**tiny, 'default_hooks.samples': hook, 'train_cfg.max_iters': 4}


def sheet(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert('RGB'))


@pytest.mark.parametrize('conditions', ['one for all', 'one each'])
def test_pictures_of_prompts(conditions: str, circles: Path, tmp_path: Path, tiny: dict[str, Any]) -> None:
    """The grids are what `model.sampler` makes of the averages, each with its prompt, condition and seed, and without
    the adapters; the images are kept, exact."""
    paths = [str(circles / 'conditioning_images' / f'{i:05d}.png') for i in range(2)]
    prompts = ['a red circle', 'a blue one']
    given = paths[0] if conditions == 'one for all' else paths
    runner = train(tmp_path, {**sample_options(tiny, prompts=prompts, conditions=dict(adapter=given)),
                              'custom_hooks': [dict(type='EMAHook', decay=0.5)]})
    shown = [paths[0], paths[0]] if conditions == 'one for all' else paths
    read = runner.model.adapters['adapter'].read_image
    rows: list[list[Any]] = [[read(read_image_input(path), (32, 32)).numpy()] for path in shown]
    runner.model.eval()
    with runner.exported_weights():
        for seed in (5, 6):
            for row, prompt, path in zip(rows, prompts, shown, strict=True):  # one by one, as kernels go by batch size
                request = Request(prompt=prompt, conditions={'adapter': path}, seed=seed)
                batch = request_batch(runner.model, [request], (32, 32))
                row.append(runner.model.decode(runner.model.sampler(runner.model, batch))[0].numpy())
    expected = labelled_grid([(p, [to_pil(i) for i in row]) for p, row in zip(prompts, rows, strict=True)],
                             ['adapter', 'seed 5', 'seed 6'], 'step 4, EMA weights')
    assert np.array_equal(sheet(tmp_path / 'samples' / 'step4.png'), np.asarray(expected))
    folder, bases = tmp_path / 'samples', []
    assert sorted(p.name for p in folder.iterdir()) == ['images', 'step4.png', 'steps.png']
    for i, (row, prompt, path) in enumerate(zip(rows, prompts, shown, strict=True)):
        batch = request_batch(runner.model, [Request(prompt=prompt, conditions={'adapter': path}, seed=5)], (32, 32))
        with runner.model.disable_adapters():
            bases.append(to_pil(runner.model.decode(runner.model.sampler(runner.model, batch))[0].numpy()))
        expected = {f'base_{i}_seed5': bases[i], f'step4_{i}_seed5': to_pil(row[1]), f'step4_{i}_seed6': to_pil(row[2])}
        for name, image in expected.items():
            with Image.open(folder / 'images' / f'{name}.png') as kept:
                assert np.array_equal(np.asarray(kept), np.asarray(image)) and kept.info['prompt'] == prompt
    assert len(list((folder / 'images').iterdir())) == 6
    grid = labelled_grid([(p, [to_pil(row[0]), base, to_pil(row[1])]) for p, row, base in zip(
        prompts, rows, bases, strict=True)], ['adapter', 'base', 'step 4'],
        'seed 5: without the adapters, and after more and more steps', cell=128)
    assert np.array_equal(sheet(folder / 'steps.png'), np.asarray(grid))
    log = next(tmp_path.rglob('*.log')).read_text()
    assert re.search(r"step4.png' took [\d.]+ s; samples took [\d.]+% of the training time so far", log)


def test_pictures_change_no_weight(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Sampling on the way, with averages swapped in and out, leaves the run bitwise as it was."""
    ema = {'custom_hooks': [dict(type='EMAHook', decay=0.5)]}
    train(tmp_path / 'without', {**tiny, **ema})
    options = sample_options(tiny, num_from_dataset=3, at_start=True)
    options['default_hooks.samples']['interval'] = 1
    train(tmp_path / 'with', {**options, **ema})
    assert curves(tmp_path / 'with') == curves(tmp_path / 'without')
    one, other = weights(tmp_path / 'with', 4), weights(tmp_path / 'without', 4)
    assert all(torch.equal(v, other[k]) for k, v in one.items())
    paths = sorted((tmp_path / 'with' / 'samples').glob('step[0-9].png'))
    assert [p.name for p in paths] == [f'step{i}.png' for i in range(5)]
    pictures = [sheet(p) for p in paths]
    assert all(p.shape == pictures[0].shape for p in pictures) and not np.array_equal(pictures[0], pictures[4])


@pytest.mark.parametrize('adapters', [True, False])
def test_an_image_is_computed_once(adapters: bool, tmp_path: Path, tiny: dict[str, Any],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the model as it stands, with adapters or, where the base itself trains, without."""
    options = sample_options(tiny, num_from_dataset=1)
    if not adapters:
        options |= {'model.adapters.adapter': None, 'model.trainable': ['unet']}
    runner = build(tmp_path, options)
    sampler, calls = runner.model.sampler, []
    monkeypatch.setattr(runner.model, 'sampler', lambda *args: calls.append(args) or sampler(*args))
    runner.train()
    assert len(calls) == 2 + adapters  # two seeds, and the base alone
    columns = sheet(tmp_path / 'samples' / 'step4.png').shape[1] // 128
    assert columns == (3 if adapters else 2)
    assert ('With and without' in (tmp_path / 'step4' / 'README.md').read_text()) == adapters
    if adapters:  # resumed with another sampler: the base's image is made again, and the steps before are left out
        runner = build(tmp_path, {**options, 'model.sampler.num_inference_steps': 1, 'train_cfg.max_iters': 8}, True)
        calls.clear()
        sampler = runner.model.sampler
        runner.model.sampler = lambda *args: calls.append(args) or sampler(*args)
        runner.train()
        assert len(calls) == 3 and sheet(tmp_path / 'samples' / 'steps.png').shape[1] // 128 == 3


def test_the_images_of_steps_have_a_bound(tmp_path: Path) -> None:
    """They stay evenly spread, however long the run; those of an export stay with it."""
    grid = StepGrid(tmp_path / 'samples', [make_batch(1, (8, 8))], 0, {})
    (tmp_path / 'step30').mkdir()
    for step in range(0, 1000, 10):
        grid.save(Image.new('RGB', (8, 8)), f'step{step}', 0, 0)
        grid.thin_out()
    steps = sorted(int(path.name.split('_')[0][4:]) for path in (tmp_path / 'samples' / 'images').iterdir())
    assert steps[0] == 0 and steps[-1] == 990 and 30 in steps and 10 < len(steps) <= 21
    assert max(np.diff(steps)) <= 220  # twice as far as 10 even ones


def test_images_are_made_in_batches_that_fit() -> None:
    """Each has its own seed; after the first batch for which memory does not suffice, they are made one by one."""
    batches: list[Batch] = []

    def model(batch: Batch, mode: str) -> list[dict[str, Any]]:
        batches.append(batch)
        if len(batch) > 2:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return [{'images': {'base': torch.full((3, 2, 2), int(seed) / 255)}} for seed in batch.seed]
    model.device = torch.device('cpu')  # type: ignore[attr-defined]
    one = make_batch(1)
    for batch_size, lengths in (('auto', [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (3, [3, 1, 1, 1, 1, 1])):
        batches.clear()
        hook = SampleHook(num_images=5, seed=40, batch_size=batch_size)
        images = hook._images(model, one)  # type: ignore[arg-type]
        assert [len(batch) for batch in batches] == lengths
        assert [np.asarray(image)[0, 0].tolist() for image in images] == [[40 + i] * 3 for i in range(5)]
    hook.batch_size = 2
    hook._images(model, one)  # type: ignore[arg-type]
    row, rows = (batch.conditions['conditioning_image'] for batch in (one, batches[-2]))
    assert batches[-2].text == one.text * 2 and torch.equal(rows, row.repeat(2, 1, 1, 1))
    with pytest.raises(UserError, match='batch_size=0'):
        SampleHook(batch_size=0)


def test_pictures_need_a_sampler_and_whole_lists(circles: Path, tmp_path: Path, tiny: dict[str, Any]) -> None:
    path = str(circles / 'conditioning_images' / '00000.png')
    options = sample_options(tiny, prompts=['a', 'b', 'c'], conditions=dict(adapter=[path, path]))
    with pytest.raises(UserError, match="adapter 'adapter' has 2 images for 3 prompts"):
        build(tmp_path / 'a', options)
    options['default_hooks.samples']['conditions'] = dict(adapter=path)
    with pytest.raises(UserError, match='model.sampler is not set'):
        train(tmp_path / 'b', {**options, 'model.sampler': None,
                               **dict.fromkeys(('test_dataloader', 'test_evaluator', 'test_cfg'))})
    # A prompt without the condition that the adapter reads: said before the first step.
    options['default_hooks.samples']['conditions'] = {}
    with pytest.raises(UserError, match="'adapter' reads 'conditioning_image'"):
        train(tmp_path / 'c', options)
    assert not (tmp_path / 'c' / 'curves.jsonl').is_file() or not curves(tmp_path / 'c')


@pytest.mark.usefixtures('with_curves_png')
def test_curves_and_events(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Every step once, also after a death; the picture; TensorBoard with loss, rate and samples."""
    options = {**sample_options(tiny, num_from_dataset=1), 'default_hooks.logger.interval': 1}
    train(tmp_path, options, die_at=3)
    assert not (tmp_path / 'curves.png').exists()
    train(tmp_path, options, resume=True)
    rows = curves(tmp_path)
    assert [row['step'] for row in rows] == [1, 2, 3, 4] and all(row.keys() == {'step', 'loss', 'lr'} for row in rows)
    assert Image.open(tmp_path / 'curves.png').size[0] > 300
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    logs = sorted({p.parent for p in tmp_path.rglob('events.out.tfevents*')})
    seen: dict[int, float] = {}
    for folder in logs:
        events = EventAccumulator(str(folder)).Reload()
        seen.update({e.step: e.value for e in events.Scalars('loss')})
    # Logged is the mean of the last ten, of which a resumed run knows those before it.
    losses = [row['loss'] for row in rows]
    assert seen == pytest.approx({i: float(np.mean(losses[:i])) for i in range(1, 5)}, rel=1e-5)
    assert events.Scalars('lr')[0].value == pytest.approx(1e-3)
    image = events.Images('samples')[0]
    assert image.step == 4 and image.width == sheet(tmp_path / 'samples' / 'step4.png').shape[1]


@pytest.mark.usefixtures('with_curves_png')
def test_several_rates_have_a_curve_each(tmp_path: Path, tiny: dict[str, Any]) -> None:
    options = {**tiny, 'model.adapters.two': dict(type='T2IAdapter'), 'train_cfg.max_iters': 1,
               'optim_wrapper.paramwise_cfg.lr.two': 0.25}
    train(tmp_path, options)
    row = curves(tmp_path)[0]
    assert row['adapter_lr'] == 1e-3 and row['two_lr'] == 0.25 and (tmp_path / 'curves.png').is_file()


@pytest.mark.usefixtures('with_curves_png')
def test_optimizers_without_a_rate_have_curves_too(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Adafactor with relative steps."""
    train(tmp_path, {**tiny, 'train_cfg.max_iters': 2, 'param_scheduler': None,
                     'optim_wrapper.optimizer': dict(_delete_=True, type='Adafactor')})
    assert [row.keys() for row in curves(tmp_path)] == [{'step', 'loss'}] * 2 and (tmp_path / 'curves.png').is_file()


def shown_on(leader: int) -> str:
    """All that a pseudo-terminal was sent: one read may return only a part of it, and the rest comes a moment later."""
    shown = b''
    while select.select([leader], [], [], 0.5)[0]:
        shown += os.read(leader, 65536)
    return shown.decode(errors='replace')


def test_progress_at_a_terminal(tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar with loss and speed on a terminal; afterwards the log's handlers write where they wrote before."""
    leader, follower = pty.openpty()
    with os.fdopen(follower, 'w') as terminal:
        monkeypatch.setattr(sys, 'stderr', terminal)
        monkeypatch.setenv('TERM', 'xterm-256color')
        runner = build(tmp_path, {**tiny, 'default_hooks.logger.interval': 1})
        consoles = [h for h in runner.logger.handlers if isinstance(h, logging.StreamHandler)
                    and not isinstance(h, logging.FileHandler)]
        before, out = [h.stream for h in consoles], sys.stdout
        runner.train()
        assert consoles and [h.stream for h in consoles] == before and sys.stdout is out and sys.stderr is terminal
        terminal.flush()
        text = shown_on(leader)
    os.close(leader)
    assert 'training' in text and 'loss' in text and 'steps/s' in text and '4/4' in text
    hook = next(h for h in runner.hooks if isinstance(h, ProgressHook))
    assert hook.bar is None


def test_progress_gives_the_terminal_back_when_training_fails(tmp_path: Path, tiny: dict[str, Any],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    from runs import command
    leader, follower = pty.openpty()
    with os.fdopen(follower, 'w') as terminal:
        monkeypatch.setattr(sys, 'stderr', terminal)
        out = sys.stdout
        assert command(tmp_path, {**tiny, 'default_hooks.poison.type': 'Poison', 'default_hooks.poison.step': 2}) == 1
        assert sys.stdout is out and sys.stderr is terminal
        terminal.flush()
        text = shown_on(leader)
    os.close(leader)
    assert 'Training stopped at step 2' in text and text.count('\x1b[?25h') >= text.count('\x1b[?25l')


def test_progress_of_a_validation_and_a_test(tmp_path: Path, tiny: dict[str, Any], circles: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """A second bar beside the training's, of pictures; one of its own in a test. The table stands above, whole."""
    leader, follower = pty.openpty()
    options = {**tiny, **evaluation('val', circles, 3, seeds=2), **evaluation('test', circles, 2)}
    with os.fdopen(follower, 'w') as terminal:
        monkeypatch.setattr(sys, 'stderr', terminal)
        monkeypatch.setenv('TERM', 'xterm-256color')
        out = sys.stdout
        runner = build(tmp_path, options)
        hook = next(h for h in runner.hooks if isinstance(h, ProgressHook))
        runner.train()
        assert hook.bar is None and sys.stdout is out
        terminal.flush()
        text = shown_on(leader)
        assert 'training' in text and 'validation' in text and '6/6' in text and 'images' in text
        assert 'adapted    brightness' in text
        runner.test()
        assert hook.bar is None and sys.stdout is out
        terminal.flush()
        text = shown_on(leader)
        assert 'training' not in text and 'test' in text and '4/4' in text
    os.close(leader)


def test_an_evaluation_without_a_terminal(tmp_path: Path, tiny: dict[str, Any], circles: Path,
                                          capfd: pytest.CaptureFixture[str]) -> None:
    """A line every `interval` batches."""
    train(tmp_path, {**tiny, **evaluation('val', circles, 5), 'default_hooks.logger.interval': 2})
    captured = capfd.readouterr()
    lines = [line for line in (captured.out + captured.err).splitlines() if 'Iter(val)' in line]
    assert len(lines) == 1 and '[2/3]' in lines[0] and 'eta:' in lines[0]
    assert '\x1b[' not in captured.out


def test_plain_lines_without_a_terminal(tmp_path: Path, tiny: dict[str, Any],
                                        capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, {**tiny, 'default_hooks.logger.interval': 2})
    captured = capfd.readouterr()
    lines = [line for line in (captured.out + captured.err).splitlines() if 'Iter(train)' in line]
    assert len(lines) == 2 and all('loss:' in line and 'eta:' in line and 'time:' in line for line in lines)
    assert '\x1b[' not in captured.out


def test_samples_that_fail_cost_no_steps(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """The checkpoint of a step is whole before its pictures are made."""
    with pytest.raises(UserError, match='not finite'):
        train(tmp_path, {**tiny, 'model.sampler.guidances': [dict(type='CFG', scale=1e38)], 'default_hooks.samples':
                         dict(type='SampleHook', interval=2, num_from_dataset=1, num_images=1, size=32,
                              at_start=False)})
    assert torch.load(tmp_path / 'step2.pth', weights_only=True)['meta']['step'] == 2
    assert (tmp_path / 'step2' / 'adapter').is_dir()


def test_pictures_of_a_stream_are_those_of_its_beginning(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Whether the run begins or goes on, and whatever training drops."""
    options = {**tiny, 'train_dataloader.dataset.type': 'HFStream', 'proportion_empty_prompts': 1.0,
               'default_hooks.samples': dict(type='SampleHook', interval=2, num_from_dataset=2, num_images=1, size=32)}
    runner = build(tmp_path, options)
    stream = runner.build_dataloader(runner._train_dataloader, seed=0).dataset
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    hook = next(h for h in runner.hooks if type(h).__name__ == 'SampleHook')
    first = hook._from_dataset(runner)
    runner.train_loop.start_at(3, 6)
    later = hook._from_dataset(runner)
    assert runner.train_dataloader.dataset.start == 6 and stream.buffer_size > 0
    for a, b in zip(first, later, strict=True):
        assert a.key == b.key and not a.drop
        assert all(torch.equal(a.conditions[k], b.conditions[k]) for k in a.conditions)


def test_an_ema_cannot_be_removed_from_a_run(tmp_path: Path, tiny: dict[str, Any]) -> None:
    train(tmp_path, {**tiny, 'custom_hooks': [dict(type='EMAHook')]})
    with pytest.raises(UserError, match='holds an EMA'):
        train(tmp_path, {**tiny, 'train_cfg.max_iters': 6}, resume=True)


def test_two_adapters_of_one_key_take_the_same_pictures(tiny_base: Path, circles: Path) -> None:
    from diffengine_sdxl.models.sdxl import SDXL
    model = SDXL(pretrained=str(tiny_base), adapters=dict(a=dict(type='T2IAdapter'), b=dict(type='T2IAdapter')))
    one, two = (str(circles / 'images' / f'0000{i}.png') for i in range(2))
    with pytest.raises(UserError, match="both read 'conditioning_image'"):
        request_batch(model, [Request(conditions={'a': one, 'b': two})], (32, 32))
    batch = request_batch(model, [Request(conditions={'a': one, 'b': one})], (32, 32))
    assert set(batch.conditions) == {'conditioning_image'}
