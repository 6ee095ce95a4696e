"""Validation losses: their value, what they may depend on, and a training that does not feel them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from runs import assert_same_run, build, curves, cut_off, train

from diffengine_sdxl import rng
from diffengine_sdxl.datasets import Draw, collate
from diffengine_sdxl.engine.hooks import curves as curves_hook
from diffengine_sdxl.engine.hooks import validation_loss
from diffengine_sdxl.engine.hooks.validation_loss import ValidationLoss
from diffengine_sdxl.errors import UserError

TIMESTEPS = [50, 900]
TRANSFORMS = [dict(type='Resize', size=32), dict(type='ComputeTimeIds'), dict(type='PackInputs')]


def rows_of(circles: Path, num: int, **changes: Any) -> dict[str, Any]:
    return dict(type='HFDataset', source=str(circles), max_samples=num, transforms=TRANSFORMS,
                conditioning_image_column='conditioning_image', **changes)


def two_sets(circles: Path) -> dict[str, Any]:
    """Three rows and the first of them; as a row of two sets it has two keys, and other noise."""
    return dict(type='Mixture', sets=dict(large=rows_of(circles, 3), small=rows_of(circles, 1)))


@pytest.fixture(scope='module')
def options(tiny_options: dict[str, Any], circles: Path) -> dict[str, Any]:
    return {**tiny_options, 'custom_hooks': [dict(type='EMAHook', decay=0.5)], 'default_hooks.first_steps': None,
            'default_hooks.checkpoint.export': False, 'default_hooks.val': dict(
                type='ValidationLoss', dataset=two_sets(circles), timesteps=TIMESTEPS, interval=2, batch_size=2)}


@pytest.fixture(scope='module')
def whole(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The runner of a finished run with validations before the first step, after two and after four."""
    return train(tmp_path_factory.mktemp('validated') / 'run', options)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / 'val_loss.jsonl').read_text().splitlines()]


def hook_of(runner: Any, **changes: Any) -> ValidationLoss:
    settings = {k: v for k, v in runner.resolved.default_hooks.val.items() if k != 'type'}
    hook = ValidationLoss(**{**settings, **changes})
    hook.before_run(runner)
    return hook


def by_diffusers(runner: Any, name: str, row: int) -> float:
    """One sample's loss with the classes of diffusers, and the documented keys of what is drawn."""
    model = runner.bare_model
    dataset = next(hook for hook in runner.hooks if isinstance(hook, ValidationLoss)).sets[name]
    batch = model.data_preprocessor(collate([dataset[Draw(row, 0, 0)]]))['inputs']
    scheduler = DDPMScheduler.from_config(model.scheduler_config)
    key = f'{name}/{row}'
    dist = model.vae.encode(batch.img).latent_dist
    drawn = torch.randn(dist.mean.shape, generator=rng.generator(0, key, 0, 'vae'))
    latents = (dist.mean + dist.std * drawn) * model.vae.config.scaling_factor
    text = model.encode(batch)
    features = model.adapters['adapter'].net(batch.conditions['conditioning_image'])
    errors = []
    for t in TIMESTEPS:
        noise = torch.randn(latents.shape, generator=rng.generator(0, key, t, 'validation_noise'))
        prediction = model.unet(
            scheduler.add_noise(latents, noise, torch.tensor([t])), t, text.text,
            added_cond_kwargs=dict(text_embeds=text.pooled, time_ids=batch.time_ids),
            down_intrablock_additional_residuals=[f * model.adapters['adapter'].scale for f in features]).sample
        errors.append(float((prediction - noise).square().mean()))
    return float(np.mean(errors))


@torch.no_grad()
def test_the_losses_are_those_of_a_plain_loop(whole: Any) -> None:
    """Of the weights that train and of the averages, of each set and of all samples."""
    rows = lines(Path(whole.work_dir))
    assert [row['step'] for row in rows] == [0, 2, 4]
    assert rows[0]['val/loss'] == rows[0]['val/loss_ema'] and rows[2]['val/loss'] != rows[2]['val/loss_ema']
    whole.bare_model.eval()
    expected = {(name, i): by_diffusers(whole, name, i) for name, num in (('large', 3), ('small', 1))
                for i in range(num)}
    large, small = ([v for (name, _), v in expected.items() if name == of] for of in ('large', 'small'))
    assert rows[2]['val/loss/large'] == pytest.approx(np.mean(large), rel=1e-5)
    assert rows[2]['val/loss/small'] == pytest.approx(np.mean(small), rel=1e-5)
    assert rows[2]['val/loss'] == pytest.approx(np.mean([*large, *small]), rel=1e-5)
    assert rows[2].keys() == {'step', *(f'val/loss{kind}' for kind in (
        '', '/large', '/small', '_ema', '_ema/large', '_ema/small'))}
    with whole.exported_weights():
        average = by_diffusers(whole, 'small', 0)
    assert rows[2]['val/loss_ema/small'] == pytest.approx(average, rel=1e-5)
    log = next(Path(whole.work_dir).rglob('*.log')).read_text()
    assert 'val/loss     val_loss.jsonl every 2 steps and at the end and before the first: 4 samples at 2' in log
    assert log.count('Validation at step 4: val/loss ') == 1 and 'of the training time so far' in log


def test_a_training_does_not_feel_it(whole: Any, options: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / 'without', {key: value for key, value in options.items() if key != 'default_hooks.val'})
    assert_same_run(tmp_path / 'without', Path(whole.work_dir), 4)


@pytest.mark.parametrize('last', [0, 4])
def test_resumed_it_repeats_nothing(last: int, whole: Any, options: dict[str, Any], tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 2's checkpoint: before its validation, or after later ones, which are made again."""
    folder = cut_off(Path(whole.work_dir), tmp_path / 'cut')
    (folder / 'val_loss.jsonl').write_text(''.join(
        json.dumps(row) + '\n' for row in lines(folder) if row['step'] <= last) + '{"step": 6, "va')
    calls: list[int] = []
    measure = ValidationLoss.measure
    monkeypatch.setattr(ValidationLoss, 'measure', lambda self, runner: calls.append(runner.iter) or measure(
        self, runner))
    train(folder, options, resume=True)
    assert calls == ([2, 3] if last == 0 else [3])
    assert (folder / 'val_loss.jsonl').read_text() == (Path(whole.work_dir) / 'val_loss.jsonl').read_text()


def test_what_it_depends_on(whole: Any, circles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the batch size, the training's seed, what is dropped, the random state, or the number of processes."""
    dropped = [TRANSFORMS[0], dict(type='CaptionDrop', prob=1.0), *TRANSFORMS[1:]]
    monkeypatch.setattr(whole, 'ema', None)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    expected = hook_of(whole).measure(whole)
    assert torch.equal(before, torch.get_rng_state())
    assert expected['val/loss'] == lines(Path(whole.work_dir))[2]['val/loss']
    monkeypatch.setattr(whole, '_seed', 7)
    one = hook_of(whole, batch_size=1, dataset=dict(two_sets(circles), sets=dict(
        large=rows_of(circles, 9) | dict(transforms=dropped), small=rows_of(circles, 1))), max_samples=3).measure(whole)
    assert one == pytest.approx(expected, rel=1e-6)
    assert hook_of(whole, seed=1).measure(whole)['val/loss'] != pytest.approx(expected['val/loss'], rel=1e-3)
    parts: list[Any] = []
    hook = hook_of(whole)
    monkeypatch.setattr(validation_loss, 'all_gather_object', lambda found: (parts.append(found), [found])[1])
    for rank in (0, 1):
        monkeypatch.setattr(validation_loss, 'get_dist_info', lambda rank=rank: (rank, 2))
        hook.measure(whole)
    assert [len(part['val/loss']) for part in parts] == [3, 1]
    monkeypatch.setattr(validation_loss, 'all_gather_object', lambda found: parts)
    monkeypatch.setattr(hook, '_batches', lambda name: (i for i in ()))
    assert hook.measure(whole) == expected


def test_masks_count(whole: Any) -> None:
    hook = hook_of(whole)
    batch = whole.bare_model.data_preprocessor(collate([hook.sets['small'][0]]))['inputs']
    with torch.no_grad():
        latents = whole.bare_model.latents(batch)
        half = torch.zeros_like(latents[:, :1])
        half[..., :2] = 1
        left, right, all_of_it = (hook._errors(whole.bare_model, replace(batch, mask=mask), latents)
                                  for mask in (half, 1 - half, None))
    assert float(left + right) == pytest.approx(float(all_of_it), rel=1e-6) and 0 < left < all_of_it


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(timesteps=[1000]), 'timesteps has 1000; the base has 1000, from 0 to 999'),
    (dict(timesteps=[]), r'timesteps=\[\] must be one or more'), (dict(timesteps=[5, 5]), 'different numbers'),
    (dict(max_samples=0), 'max_samples=0'), (dict(dataset=dict(type='HFStream')), 'must have numbered rows'),
    (dict(dataset=dict(on_bad_image='skip')), "on_bad_image='skip', which would count another sample")])
def test_what_is_refused(changes: dict[str, Any], message: str, whole: Any, circles: Path) -> None:
    if 'dataset' in changes:
        changes = dict(dataset={**rows_of(circles, 2), **changes['dataset']})
    with pytest.raises(UserError, match=message):
        hook_of(whole, **changes)


def test_an_objective_that_does_not_denoise(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole.bare_model, 'objective', object())
    with pytest.raises(UserError, match='denoises, which object does not train'):
        hook_of(whole)


def test_curves_show_it(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panel for all samples, one for the sets; both with the averages."""
    drawn: list[Any] = []
    monkeypatch.setattr(curves_hook, 'save_curves', lambda path, panels, title: drawn.append(panels))
    next(hook for hook in whole.hooks if type(hook).__name__ == 'CurvesHook').after_train(whole)
    rows = lines(Path(whole.work_dir))
    assert list(drawn[0]['loss']) == ['loss'] and len(drawn[0]['val/loss of each data set']) == 4
    assert drawn[0]['val/loss'] == {f'val/loss{ema}': ([0, 2, 4], [row[f'val/loss{ema}'] for row in rows], (), (), -1)
                                    for ema in ('', '_ema')}


def test_losses_of_each_set(tiny: dict[str, Any], circles: Path, tmp_path: Path) -> None:
    """The mean over a set's samples in all micro-batches of a step; a set without samples is left out."""
    seen: list[tuple[str, float]] = []
    options = {**tiny, 'train_cfg.max_iters': 4, 'train_dataloader.dataset': dict(two_sets(circles), _delete_=True),
               'train_dataloader.batch_size': 1, 'optim_wrapper.accumulative_counts': 3,
               'default_hooks.checkpoint.interval': None, 'default_hooks.checkpoint.export': False,
               'default_hooks.first_steps': None, 'default_hooks.logger.interval': 1}
    runner = build(tmp_path, options)
    runner.bare_model.register_forward_hook(lambda model, args, kwargs, out: seen.append(
        (kwargs['inputs'].data_set[0], float(out['loss'].detach()))), with_kwargs=True)
    runner.train()
    for row, step in zip(curves(tmp_path), [seen[i:i + 3] for i in range(0, 12, 3)], strict=True):
        expected = {f'loss/{name}': np.mean([loss for of, loss in step if of == name]) for name in dict(step)}
        assert {k: v for k, v in row.items() if '/' in k} == pytest.approx(expected, rel=1e-6)
        assert row['loss'] == pytest.approx(np.mean([loss for _, loss in step]), rel=1e-6)
    assert {name for name, _ in seen} == {'large', 'small'}
    assert re.search(r'Iter\(train\).* loss: .* loss/large: ', next(tmp_path.rglob('*.log')).read_text())
