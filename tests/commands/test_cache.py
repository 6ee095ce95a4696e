"""Caches: the same training step as on the pictures, bitwise; whole or not at all; nothing else is overwritten."""

import argparse
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import assert_same, grads
from runs import curves, train
from safetensors import safe_open

from diffengine_sdxl import config
from diffengine_sdxl.commands.cache import write_cache
from diffengine_sdxl.datasets import CachedLatents, Draw, collate
from diffengine_sdxl.datasets.cached import ORIGIN, ROWS
from diffengine_sdxl.errors import UserError, run_command
from diffengine_sdxl.models.data_preprocessor import images_to_floats, pack
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import DATASETS, TRANSFORMS

ROOT = Path(__file__).resolve().parents[2]
#: The shapes world, cropped: latents, captions, time ids and a condition that all depend on the row and its epoch.
SHAPES = """
_base_ = ['diffengine_sdxl::_base_/models/shapes.py', 'diffengine_sdxl::_base_/datasets/shapes.py']
default_scope = 'diffengine_sdxl'
resolution = 32
train_dataloader = dict(batch_size=2, dataset=dict(length=5, oversize=1.0, transforms=[
    dict(type='CaptionDrop', prob=0.9), dict(type='Crop', size='$resolution', mode='random'),
    dict(type='ComputeTimeIds'), dict(type='PackInputs')]))
randomness = dict(seed=3)
"""


@pytest.fixture(scope='module')
def shapes(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Callable[..., Any]:
    """The config above on the tiny base, with overrides."""
    path = tmp_path_factory.mktemp('configs') / 'shapes.py'
    path.write_text(SHAPES)
    return lambda **options: config.load(path, {'model.pretrained': str(tiny_base), **options})


@pytest.fixture(scope='module')
def cache(shapes: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five rows, one file. Don't write into it."""
    folder = tmp_path_factory.mktemp('cache') / 'cache'
    assert write_cache(shapes(), folder) == 5
    return folder


def pictures(cfg: Any) -> Any:
    """The data set that is cached."""
    return DATASETS.build(config.resolve(cfg).train_dataloader.dataset)


def batch_of(data: Any, index: list[int], epoch: int = 0, seed: int = 3) -> Any:
    return pack(images_to_floats(collate([data[Draw(i, epoch, seed)] for i in index])))


def test_a_training_step_is_bitwise_that_on_the_pictures(shapes: Callable[..., Any], cache: Path,
                                                         tiny_base: Path) -> None:
    """Loss and every gradient of the UNet and of an adapter, in the epoch that was cached, captions dropped alike."""
    drop = [dict(type='CaptionDrop', prob=0.9)]
    seen, cached = pictures(shapes()), CachedLatents(cache, transforms=drop)
    model = SDXL(pretrained=str(tiny_base), trainable=['unet'], objective=dict(type='Denoise'),
                 adapters=dict(adapter=dict(type='T2IAdapter', condition_key='conditioning_image')))
    for index in ([0, 1], [2, 3], [4]):
        one, other = batch_of(seen, index), batch_of(cached, index)
        assert one.text == other.text and one.key == other.key and torch.equal(one.time_ids, other.time_ids)
        assert torch.equal(one.conditions['conditioning_image'], other.conditions['conditioning_image'])
        assert other.img is None and one.latents is None
        (loss, found), (expected_loss, expected) = grads(model, other), grads(model, one)
        assert torch.equal(loss, expected_loss) and len(expected) > 100
        assert_same(found, expected)
    later = batch_of(cached, [0, 1], epoch=1)
    assert not torch.equal(grads(model, later)[0], grads(model, batch_of(cached, [0, 1]))[0]), 'noise is drawn anew'


def test_a_run_on_a_cache_is_the_run_on_the_pictures(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """By the command lines of both tools: the same curve in the first epoch, in the data's own order."""
    options = {**tiny, 'randomness.seed': 1, 'train_cfg.max_iters': 4, 'default_hooks.logger.interval': 1,
               'train_dataloader.sampler.shuffle': False, 'default_hooks.checkpoint.interval': 4}
    arguments = [f'{k}={v}' for k, v in options.items() if k.startswith(('model.pre', 'train_data', 'resol', 'random'))]
    assert run_command('cache', argparse.Namespace(
        config='tiny_t2i_adapter', folder=tmp_path / 'cache', num_samples=None,
                                           cfg_options=arguments)) == 0
    train(tmp_path / 'pictures', options)
    leaf = tmp_path / 'cached.py'
    leaf.write_text("_base_ = ['diffengine_sdxl::tiny/tiny_t2i_adapter.py']\ntrain_dataloader = dict(dataset=dict("
                    f"_delete_=True, type='CachedLatents', source='{tmp_path / 'cache'}'))\n")
    train(tmp_path / 'cached', {k: v for k, v in options.items() if k != 'train_dataloader.dataset.source'},
          name=str(leaf))
    found = [[row['loss'] for row in curves(tmp_path / name)] for name in ('pictures', 'cached')]
    assert found[0] == found[1] and len(set(found[0])) == 4
    states = [torch.load(tmp_path / name / 'step4.pth', weights_only=True)['state_dict']
              for name in ('pictures', 'cached')]
    assert_same(*states)


def test_everything_but_dropped_captions_is_kept(shapes: Callable[..., Any], cache: Path) -> None:
    """Captions as they were before CaptionDrop, true crops, conditions bit for bit, and where it all came from."""
    cfg = shapes()
    seen, cached = pictures(cfg), CachedLatents(cache)
    texts = [seen.scene(i).caption for i in range(5)]
    assert [cached[i]['text'] for i in range(5)] == texts != [seen[Draw(i, 0, 3)]['text'] for i in range(5)]
    assert {tuple(cached[i]['time_ids'].tolist()[:2]) for i in range(5)} > {tuple(cached[0]['time_ids'].tolist()[:2])}
    for i in range(5):
        one, other = seen[Draw(i, 0, 3)], cached[Draw(i, 0, 3)]
        assert torch.equal(one['time_ids'], other['time_ids']) and cached.key(i) == seen.key(i)
        assert torch.equal(one['conditioning_image'], other['conditioning_image'])
        assert other['latents'].shape == (4, 4, 4) and other['latents'].dtype == torch.float32
    origin = json.loads((cache / ORIGIN).read_text())
    assert origin['num_samples'] == 5 and origin['seed'] == 3 and origin['dataset']['type'] == 'Shapes'
    assert origin['pretrained'] == cfg.model.pretrained and origin['scaling_factor'] == 0.13025
    assert config.resolve(cfg).train_dataloader.dataset.transforms[0].type == 'CaptionDrop', 'the config is untouched'


def test_shards_and_batches_change_nothing(shapes: Callable[..., Any], cache: Path, tmp_path: Path) -> None:
    """Several files, the last batch short, and the rows in their order."""
    assert write_cache(shapes(), tmp_path / 'x', shard_size=2) == 5
    assert sorted(p.name for p in (tmp_path / 'x').iterdir()) == [
        '000000000.safetensors', '000000002.safetensors', '000000004.safetensors', ORIGIN, ROWS]
    assert write_cache(shapes(**{'train_dataloader.batch_size': 5}), tmp_path / 'y') == 5
    whole = CachedLatents(cache)
    for data, tolerance in ((CachedLatents(tmp_path / 'x'), 0.0), (CachedLatents(tmp_path / 'y'), 1e-5)):
        for i in range(5):
            assert (data[i]['key'], data[i]['text']) == (whole[i]['key'], whole[i]['text'])
            assert (data[i]['latents'] - whole[i]['latents']).abs().max() <= tolerance
            assert torch.equal(data[i]['conditioning_image'], whole[i]['conditioning_image'])


def test_fewer_rows_and_more_than_there_are(shapes: Callable[..., Any], cache: Path, tmp_path: Path) -> None:
    """Rows that come again are those of the next epoch: cropped anew, and keyed so that their noise is another's."""
    assert write_cache(shapes(), tmp_path / 'x', num_samples=3) == 3
    few, whole = CachedLatents(tmp_path / 'x'), CachedLatents(cache)
    assert len(few) == 3 and torch.equal(few[1]['latents'], whole[1]['latents'])
    assert write_cache(shapes(), tmp_path / 'x', num_samples=12) == 12
    more, seen = CachedLatents(tmp_path / 'x'), pictures(shapes())
    assert len(more) == 12 and torch.equal(more[3]['latents'], whole[3]['latents'])
    for i in range(12):
        assert torch.equal(more[i]['time_ids'], seen[Draw(i % 5, i // 5, 3)]['time_ids'])
        assert more[i]['text'] == seen.scene(i % 5).caption
    assert len({more.key(i) for i in range(12)}) == 12 and [more.key(i) for i in range(5)] == [
        whole.key(i) for i in range(5)]
    assert len({more[i]['latents'].numpy().tobytes() for i in range(12)}) == 12


@TRANSFORMS.register_module(force=True)
class Labelled:
    """Adds all that a sample may hold besides, or whatever `given` says."""

    def __init__(self, given: Any = None) -> None:
        self.given = given

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        number = float(sample['key'].split('/')[1])
        extra = {'weight': torch.tensor(number / 3), 'pose': torch.arange(4.0) * number - 1, 'text_2': 'also ' + sample[
            'text'], 'mask': torch.full((1, 4, 4), number)}
        drop = {'drop': {'text': True}} if self.given == 'drop' else {}
        return {**sample, **extra, **drop, **({self.given: torch.full((3, 4, 4), 1.5)} if self.given == 'wide' else {})}


def labelled(shapes: Callable[..., Any], given: str | None = None) -> Any:
    cfg = shapes()
    cfg.train_dataloader.dataset.transforms.append(dict(type='Labelled', given=given))
    return cfg


def test_what_else_a_sample_holds_is_kept(shapes: Callable[..., Any], tmp_path: Path) -> None:
    """Weights and masks of the loss, a second caption, a condition that is no picture."""
    cfg = labelled(shapes)
    write_cache(cfg, tmp_path / 'x')
    one, other = batch_of(pictures(cfg), [4, 2]), batch_of(CachedLatents(tmp_path / 'x'), [4, 2])
    for name in ('weight', 'mask', 'time_ids'):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.conditions.keys() == other.conditions.keys()
    assert torch.equal(one.conditions['pose'], other.conditions['pose'])
    assert other.text_2 is not None and other.text_2[0].startswith('also ')


@pytest.mark.parametrize(('given', 'words'), [
    ('drop', "drops 'text' in some rows.*Leave it to the config that trains on the cache"),
    ('wide', r"condition 'wide' is in \[1.5, 1.5\]")])
def test_what_cannot_be_kept_is_refused(given: str, words: str, shapes: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        write_cache(labelled(shapes, given), tmp_path / 'x')
    assert not list(tmp_path.iterdir())


def test_what_is_refused_before_anything_is_done(shapes: Callable[..., Any], cache: Path, circles: Path,
                                                 tmp_path: Path) -> None:
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.tex').write_text('x')
    (tmp_path / 'file').write_text('x')
    for name in ('mine', 'file'):
        with pytest.raises(UserError, match=f"{name}' exists and was not written by this command; name another folder"):
            write_cache(shapes(), tmp_path / name)
    for options in (dict(num_samples=0), dict(num_samples=-3), dict(shard_size=0)):
        with pytest.raises(UserError, match=r'(num_samples|shard_size)=-?\d must be at least 1'):
            write_cache(shapes(), tmp_path / 'x', **options)
    streamed, empty = shapes(), shapes()
    streamed.train_dataloader.dataset = dict(type='HFStream', source=str(circles))
    with pytest.raises(UserError, match='A stream cannot be cached'):
        write_cache(streamed, tmp_path / 'x')
    empty.pop('train_dataloader')
    with pytest.raises(UserError, match="config has no 'train_dataloader'"):
        write_cache(empty, tmp_path / 'x')
    assert (tmp_path / 'mine' / 'thesis.tex').read_text() == 'x' and sorted(p.name for p in tmp_path.iterdir()) == [
        'file', 'mine']
    (tmp_path / 'empty').mkdir()
    assert write_cache(shapes(), tmp_path / 'empty', num_samples=1) == 1


def test_half_a_cache_is_never_left(shapes: Callable[..., Any], tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends it: nothing is there, or what was there before; and the next attempt replaces that."""
    def ends(error: BaseException) -> Callable[..., Any]:
        stock = SDXL.latents

        def latents(model: SDXL, batch: Any) -> Any:
            if 'train/2' in batch.key:
                raise error
            return stock(model, batch)
        return latents
    for error in (ValueError('no more'), KeyboardInterrupt()):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(SDXL, 'latents', ends(error))
            write_cache(shapes(), tmp_path / 'x', shard_size=1)
        assert not list(tmp_path.iterdir())
    write_cache(shapes(), tmp_path / 'x', num_samples=2)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match='no more'):
        patch.setattr(SDXL, 'latents', ends(ValueError('no more')))
        write_cache(shapes(), tmp_path / 'x')
    assert len(CachedLatents(tmp_path / 'x')) == 2 and [p.name for p in tmp_path.iterdir()] == ['x']
    write_cache(shapes(), tmp_path / 'x', num_samples=3, shard_size=1)
    assert len(CachedLatents(tmp_path / 'x')) == 3 and [p.name for p in tmp_path.iterdir()] == ['x']


def test_a_cache_on_random_weights_follows_the_runs_seed(shapes: Callable[..., Any], tiny_base: Path,
                                                         tmp_path: Path) -> None:
    """As the runner gives it to the model, so that the run is the same run."""
    cfg = shapes(**{'model.pretrained': None, 'model.config': str(tiny_base)})
    write_cache(cfg, tmp_path / 'x', num_samples=2)
    batch = batch_of(pictures(cfg), [0, 1])
    expected = SDXL(config=str(tiny_base), seed=3).latents(batch)
    assert torch.equal(batch_of(CachedLatents(tmp_path / 'x'), [0, 1]).latents, expected)


def run_tool(*arguments: str) -> Any:
    """The exit code of tools/cache.py, without its process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, 'argv', ['cache.py', *arguments])
        runpy.run_path(str(ROOT / 'tools' / 'cache.py'), run_name='__main__')
    return ended.value.code


def test_the_command_line(tiny_base: Path, circles: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Written with a word of where; a mistake is a sentence, and a stop is no traceback."""
    options = ['--cfg-options', f'model.pretrained={tiny_base}', f'train_dataloader.dataset.source={circles}',
               'resolution=32']
    folder = tmp_path / 'cache'
    assert run_tool('tiny_t2i_adapter', str(folder), '--num-samples', '3', *options) == 0
    assert f'3 samples are in {folder}' in ''.join(capfd.readouterr().out.splitlines())
    with safe_open(folder / '000000002.safetensors', framework='pt') as tensors:
        assert tensors.get_slice('conditioning_image').get_shape() == [3, 3, 32, 32]
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'a').touch()
    for arguments, words in (((str(tmp_path / 'mine'), *options), 'exists and was not written by this command'),
                             ((str(folder), *options, 'model.vae=/nowhere'), "no file or folder '/nowhere'"),
                             ((str(folder), *options, 'resolutoin=32'), "Did you mean 'resolution'"),
                             ((str(folder), '--num-samples', '0', *options), 'num_samples=0')):
        assert run_tool('tiny_t2i_adapter', *arguments) == 1
        errors = capfd.readouterr().err.strip().splitlines()
        assert len(errors) == 1 and errors[0].startswith('error: ') and words in errors[0], errors

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt
    monkeypatch.setattr(SDXL, 'latents', interrupt)
    assert run_tool('tiny_t2i_adapter', str(folder), *options) == 130
    assert capfd.readouterr().err.strip() == 'Stopped; nothing was written.' and len(CachedLatents(folder)) == 3


def test_a_model_with_another_vae_is_refused(cache: Path, tiny_base: Path) -> None:
    """The encoder's weights decide, in whatever precision, and the factor that its latents are scaled by."""
    data, model = CachedLatents(cache), SDXL(pretrained=str(tiny_base))
    data.check_model(model)
    model.vae.half()
    data.check_model(model)
    model.vae.float().decoder.conv_out.weight.data.add_(1)
    data.check_model(model)
    held = model.vae.config.scaling_factor
    model.vae.register_to_config(scaling_factor=2 * held)
    with pytest.raises(UserError, match='latents of another VAE'):
        data.check_model(model)
    model.vae.register_to_config(scaling_factor=held)
    model.vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 0.5
    with pytest.raises(UserError, match='latents of another VAE'):
        data.check_model(model)
