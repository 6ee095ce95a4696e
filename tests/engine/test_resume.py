"""A run that died and was resumed equals one that did not, bitwise."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import assert_same_run, build, curves, cut_off, train, weights

from diffengine_sdxl.engine import run_identity as identity
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading import checkpoint
from diffengine_sdxl.objectives.denoise import Denoise

RANDOM_TRANSFORMS = [
    dict(type='Resize', size=40), dict(type='Crop', size='$resolution', mode='random'), dict(type='Flip', prob=0.5),
    dict(type='CaptionDrop', prob=0.5), dict(type='ComputeTimeIds'), dict(type='PackInputs')]
COSINE = dict(_delete_=True, type='DiffusersLR', name='cosine', num_warmup_steps=3)


@pytest.fixture(scope='module')
def whole(tiny_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny options. Don't write into it."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    train(folder, tiny_options)
    return folder


@pytest.fixture
def one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the same seed each time, so that two runs without a configured seed can be compared."""
    monkeypatch.setattr(identity.secrets, 'randbelow', lambda _: 987654321)


def check_resume(folder: Path, options: dict[str, Any], steps: int, die_at: int) -> None:
    """Compare a whole run with one that dies at `die_at`, after its last checkpoint, and is resumed."""
    train(folder / 'whole', options)
    train(folder / 'cut', options, die_at=die_at)
    last = checkpoint.latest(folder / 'cut')
    assert last is not None and 0 < int(last.stem[4:]) < die_at
    train(folder / 'cut', options, resume=True)
    assert_same_run(folder / 'whole', folder / 'cut', steps)


def test_with_everything_that_is_random(tmp_path: Path, tiny: dict[str, Any], one_seed: None) -> None:
    """Accumulation 3, two workers, shuffling, dropped captions, random crops and flips, a cosine, an EMA, sample
    images, and no seed: 6 steps, cut off at 5, in the third epoch."""
    options = {**tiny, 'train_cfg.max_iters': 6, 'optim_wrapper.accumulative_counts': 3, 'randomness.seed': None,
               'train_dataloader.num_workers': 2, 'train_dataloader.dataset.transforms': RANDOM_TRANSFORMS,
               'param_scheduler': COSINE, 'custom_hooks': [dict(type='EMAHook', decay=0.9)],
               'default_hooks.checkpoint.interval': 4,
               'default_hooks.samples': dict(type='SampleHook', interval=3, num_from_dataset=1, num_images=1,
                                             size='$resolution')}
    check_resume(tmp_path, options, 6, die_at=5)
    state = torch.load(tmp_path / 'cut' / 'step6.pth', weights_only=True)
    assert state['meta']['seed'] == 987654321 and state['meta']['position'] == 6 * 3 * 2
    assert state['ema']['step'] == 6 and state['ema']['weights'].keys() == state['state_dict'].keys()
    rates = [row['lr'] for row in curves(tmp_path / 'cut')]
    assert rates[0] == 0 and rates[3] == max(rates) and rates[-1] < rates[4] < rates[3]


def test_a_drawn_seed_is_kept(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Without a seed two runs differ; a resumed one keeps its seed."""
    options = {**tiny, 'randomness.seed': None}
    seeds = [train(tmp_path / name, options, die_at=2).seed for name in 'ab']
    assert seeds[0] != seeds[1]
    assert torch.load(tmp_path / 'a' / 'step2.pth')['meta']['seed'] == seeds[0]
    losses = [curves(tmp_path / name)[0]['loss'] for name in 'ab']
    assert losses[0] != losses[1]
    assert build(tmp_path / 'a', options, resume=True).seed == seeds[0]
    assert identity.read(tmp_path / 'a')['seed'] == seeds[0]


@pytest.mark.parametrize('kind', ['fp16', 'mmengine', 'stream', 'adafactor', 'partners'])
def test_of_every_kind(kind: str, tmp_path: Path, tiny: dict[str, Any]) -> None:
    """With fp16's gradient scaler, mmengine's schedules, a stream, another optimizer, partners that are drawn."""
    options = {**tiny, 'train_cfg.max_iters': 6, 'default_hooks.checkpoint.export': False, **{
        # The first steps overflow and are left out, then the scale grows every two steps.
        'fp16': {'mixed_precision': 'fp16', 'optim_wrapper.accumulative_counts': 2,
                 'optim_wrapper.loss_scale': dict(init_scale=2.0**40, growth_interval=1, backoff_factor=2.0**-16)},
        'mmengine': {'param_scheduler': [
            dict(type='LinearLR', start_factor=0.1, end=3), dict(type='CosineAnnealingLR', begin=3, T_max=3)]},
        'stream': {'train_dataloader.dataset.type': 'HFStream', 'train_dataloader.dataset.buffer_size': 5,
                   'train_dataloader.num_workers': 2, 'train_dataloader.sampler': None},
        'partners': {'model.adapters.style': dict(type='LoRA', rank=2), 'model.partners': dict(
            style=dict(prob=0.5, scale=(0.5, 1.0)), adapter=dict(prob=0.5, scale=(0.5, 1.0), start=(0.0, 0.3)))},
        'adafactor': {'optim_wrapper.optimizer': dict(_delete_=True, type='Adafactor', lr=1e-3)},
    }[kind]}
    check_resume(tmp_path, options, 6, die_at=5)
    if kind == 'fp16':
        state = torch.load(tmp_path / 'cut' / 'step6.pth', weights_only=True)
        scales = state['log_scalars']['train/loss_scale']['history'].tolist()
        assert len(scales) == 6 and len(set(scales)) > 2 and min(scales) < 2.0**40
    if kind == 'mmengine':
        rates = [row['lr'] for row in curves(tmp_path / 'cut')]
        assert rates[0] == pytest.approx(1e-4) and rates[1] > rates[0] and rates[-1] < max(rates)


def test_with_a_model_that_draws_for_itself(tmp_path: Path, tiny: dict[str, Any],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout and the like use the global generators, which are seeded for each micro-batch and never saved.

    No two draws of a run are the same, and reading the data or making images does not shift them.
    """
    drawn: list[tuple[float, ...]] = []
    honest = Denoise.__call__

    def with_draws(self: Any, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
        return {'loss': honest(self, model, batch)['loss'] * (1 + sum(drawn[-1]))}
    monkeypatch.setattr(Denoise, '__call__', with_draws)
    options = {**tiny, 'optim_wrapper.accumulative_counts': 2}
    check_resume(tmp_path, options, 4, die_at=3)
    assert drawn[:6] == drawn[8:14] and drawn[4:8] == drawn[14:]
    assert len(set(drawn)) == 8 and all(len(set(column)) == 8 for column in zip(*drawn[:8], strict=True))


def test_a_run_can_be_made_longer(tmp_path: Path, tiny: dict[str, Any], whole: Path) -> None:
    """4 steps, resumed with 8, equal 8 at a constant rate."""
    train(tmp_path / 'long', {**tiny, 'train_cfg.max_iters': 8})
    train(cut_off(whole, tmp_path / 'cut', step=4), {**tiny, 'train_cfg.max_iters': 8}, resume=True)
    assert_same_run(tmp_path / 'long', tmp_path / 'cut', 8)


def test_resume_at_the_end_changes_nothing(tmp_path: Path, tiny: dict[str, Any], whole: Path) -> None:
    folder = cut_off(whole, tmp_path / 'run', step=4)
    train(folder, tiny, resume=True)
    assert {p.name: p.read_bytes() for p in folder.glob('step*.pth')} == {
        p.name: p.read_bytes() for p in whole.glob('step*.pth')}
    assert [row['step'] for row in curves(folder)] == [1, 2, 3, 4]


def test_resume_of_a_named_checkpoint(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """An older checkpoint, in another folder: the seed comes with it, and the end is the same."""
    options = {**tiny, 'randomness.seed': None}
    train(tmp_path / 'old', options)
    runner = train(tmp_path / 'new', options, resume=str(tmp_path / 'old' / 'step2.pth'))
    assert runner.seed == identity.read(tmp_path / 'old')['seed']
    old, new = (torch.load(tmp_path / name / 'step4.pth', weights_only=True) for name in ('old', 'new'))
    assert all(torch.equal(old['state_dict'][k], new['state_dict'][k]) for k in old['state_dict'])
    with pytest.raises(UserError, match='seed was'):
        train(tmp_path / 'third', {**tiny, 'randomness.seed': 5}, resume=str(tmp_path / 'old' / 'step2.pth'))


def test_resume_of_a_run_that_died_before_its_first_checkpoint(tmp_path: Path, tiny: dict[str, Any],
                                                               whole: Path) -> None:
    """It starts over, from the weights of `load_from` and with the seed it had drawn."""
    options = {**tiny, 'load_from': str(whole / 'step4.pth'), 'randomness.seed': None, 'train_cfg.max_iters': 2}
    seed = train(tmp_path / 'cut', options, die_at=1).seed
    assert checkpoint.latest(tmp_path / 'cut') is None
    train(tmp_path / 'cut', options, resume=True)
    train(tmp_path / 'again', {**options, 'randomness.seed': seed})
    assert_same_run(tmp_path / 'again', tmp_path / 'cut', 2)


def test_an_ema_starts_with_the_loaded_weights(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """load_from takes the averages of the other run, and the new average starts there."""
    options = {**tiny, 'custom_hooks': [dict(type='EMAHook', decay=0.5, warmup=False)]}
    train(tmp_path / 'first', options)
    first = torch.load(tmp_path / 'first' / 'step4.pth', weights_only=True)
    options = {**options, 'load_from': str(tmp_path / 'first' / 'step4.pth'), 'train_cfg.max_iters': 1}
    train(tmp_path / 'second', options)
    second = torch.load(tmp_path / 'second' / 'step1.pth', weights_only=True)
    for name, start in first['ema']['weights'].items():
        expected = start + 0.5 * (second['state_dict'][name] - start)
        torch.testing.assert_close(second['ema']['weights'][name], expected, rtol=0, atol=1e-7)
    # One small step away from the averages, not from the raw weights.
    distance = max(float((second['state_dict'][n] - w).abs().max()) for n, w in first['ema']['weights'].items())
    assert 0 < distance < 1.1e-3


def test_an_ema_that_the_checkpoint_lacks_is_refused(tmp_path: Path, tiny: dict[str, Any], whole: Path) -> None:
    with pytest.raises(UserError, match='holds no EMA'):
        train(cut_off(whole, tmp_path / 'run'), {**tiny, 'custom_hooks': [dict(type='EMAHook')]}, resume=True)


def test_intervals_and_workers_may_change(tmp_path: Path, tiny: dict[str, Any], whole: Path) -> None:
    """No sample depends on them; nor on what is recomputed, which the checkpoint records."""
    train(tmp_path / 'cut', tiny, die_at=3)
    changed = {**tiny, 'train_dataloader.num_workers': 1, 'default_hooks.checkpoint.interval': 3,
               'default_hooks.logger.interval': 1, 'model.gradient_checkpointing': True}
    train(tmp_path / 'cut', changed, resume=True)
    path = tmp_path / 'cut' / 'step4.pth'
    state = torch.load(path)
    assert state['meta']['speed'].pop('checkpointing') == 'full'
    state['meta']['speed']['checkpointing'] = 'off'
    torch.save(state, path)
    assert_same_run(whole, tmp_path / 'cut', 4)
    assert sorted(p.name for p in (tmp_path / 'cut').glob('step*.pth')) == ['step2.pth', 'step3.pth', 'step4.pth']


def test_files_of_a_killed_run_are_removed(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Half-written files of a killed process are removed, and an export without a checkpoint is made again."""
    train(tmp_path, tiny, die_at=3)
    for name in ('step4.pth', 'step4'):
        part = tmp_path / f'.{name}.abcd1234.part'
        part.mkdir()
        (part / name).write_bytes(b'half')
    shutil.copytree(tmp_path / 'step2', tmp_path / 'step4')
    with open(tmp_path / 'curves.jsonl', 'a') as file:
        file.write('{"step": 3, "lo')
    train(tmp_path, tiny, resume=True)
    assert not list(tmp_path.glob('.*'))
    assert [row['step'] for row in curves(tmp_path)] == [1, 2, 3, 4]
    from safetensors.torch import load_file
    exported = load_file(tmp_path / 'step4' / 'adapter' / 'diffusion_pytorch_model.safetensors')
    held = {k.removeprefix('adapters.adapter.net.'): v for k, v in weights(tmp_path, 4).items()}
    assert exported.keys() == held.keys() and all(torch.equal(exported[k], held[k]) for k in held)
