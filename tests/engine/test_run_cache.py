"""A training through the cache is bitwise the one without: cold and warm, with crops, flips and drops."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, cut_off, train
from torch.utils.data import Dataset

from diffengine_sdxl.cache.store import Store
from diffengine_sdxl.config.load import load
from diffengine_sdxl.datasets import base as datasets
from diffengine_sdxl.engine.run_cache import RunCache, open_store
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading.deferred import Deferred
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import write_tiny_image_encoder

STEPS = 4
GEOMETRY: list[dict[str, Any]] = [
    dict(type='Resize', size=40), dict(type='Crop', size=32, mode='random'), dict(type='Flip', prob=0.5)]
END: list[dict[str, Any]] = [dict(type='ComputeTimeIds'), dict(type='PackInputs')]


def prompts(encoder: Path) -> dict[str, Any]:
    """A LoRA and image prompts of both kinds, dropped at random; captions too, which then read ''."""
    folder = dict(image_encoder=str(encoder), image_encoder_subfolder=None)
    adapters = dict(_delete_=True, lora=dict(type='LoRA', rank=2),
                    base=dict(type='IPAdapter', condition_key='reference', **folder),
                    plus=dict(type='IPAdapter', condition_key='other', architecture='plus', **folder))
    images = [dict(type='ImagePrompt', source='img', key=key, size=64) for key in ('reference', 'other')]
    drop = dict(type='JointDrop', adapters=['base', 'plus'], image=0.3, text=0.3, both=0.2)
    return {'model.adapters': adapters, 'model.null_prompt': 'empty',
            'train_dataloader.dataset.transforms': [*images, *GEOMETRY, drop, *END]}


@pytest.fixture(scope='module')
def options(tiny_base: Path, circles: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Case -> options: three rows in batches of two, so that the fourth step has the third row's second variant."""
    common = {'model.pretrained': str(tiny_base), 'resolution': 32, 'train_cfg.max_iters': STEPS,
              'train_dataloader.dataset.source': str(circles), 'train_dataloader.dataset.max_samples': 3,
              'train_dataloader.dataset.variants': 3, 'train_dataloader.batch_size': 2,
              'optim_wrapper.accumulative_counts': 1, 'default_hooks.samples': None}
    encoder = write_tiny_image_encoder(tmp_path_factory.mktemp('encoder'))
    dropping = [*GEOMETRY, dict(type='CaptionDrop', prob=0.5), *END]
    return {'t2i': {**common, 'default_hooks.checkpoint.interval': 2, 'train_dataloader.dataset.transforms': dropping},
            'prompts': {**common, 'default_hooks.checkpoint.interval': None, **prompts(encoder)}}


def nothing_is_loaded(*_: Any, **__: Any) -> Any:
    pytest.fail('something was computed that the cache has')


def test_cold_and_warm_runs(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and checkpoints. A warm run decodes no image and builds no encoder; it may resume one without a cache."""
    for case, own in options.items():
        folders = [tmp_path / f'{case} {name}' for name in ('without', 'cold', 'warm')]
        cached = {**own, 'cache': str(tmp_path / 'cache')}
        train(folders[0], own)
        cold = train(folders[1], {**cached, 'train_dataloader.num_workers': int(case == 't2i')})
        assert_same_run(*folders[:2], STEPS)
        assert cold.bare_model.store is None and cold.bare_model.deferred_bytes == 0
        with monkeypatch.context() as patch:
            patch.setattr(Deferred, 'load', nothing_is_loaded)
            patch.setattr(datasets.SampleBuilder, 'transform', nothing_is_loaded)
            read_only = {**own, 'cache': dict(folder=str(tmp_path / 'cache'), read_only=True)}
            resumed = case == 't2i'
            warm = train(cut_off(*folders[::2]) if resumed else folders[2], read_only, resume=resumed)
        assert_same_run(*folders[::2], STEPS)
        counts = warm.cache.store.counts
        assert counts.keys() == {'sample', 'moments', 'text'} | ({'image_embeds'} if case == 'prompts' else set())
        assert all(misses == 0 < hits for hits, misses in counts.values())
        assert warm.bare_model.deferred_bytes > 0 and not warm.bare_model.is_loaded('text_encoder')


class Bare(Dataset[Any]):
    """A data set of somebody else's, which has no `attach_cache`."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return dict(text='a circle' if index else 'a square', key=str(index), epoch=0, seed=0,
                    time_ids=torch.tensor([32., 32, 0, 0, 32, 32]), img=torch.zeros(3, 32, 32))


def test_captions_of_a_bare_data_set(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are cached; nothing else is."""
    said: list[str] = []
    monkeypatch.setattr('diffengine_sdxl.engine.run_cache.print_log', lambda text, **_: said.append(text))
    for hits in (0, 2):
        model = SDXL(str(tiny_base), lazy_encoders=True)
        cache = RunCache(Store(str(tmp_path / 'cache')), model)
        cache.attach(Bare(), trains=True)
        collated = {'text': ['a', 'b'], 'drop': {}}
        cache.keep_samples(collated)
        assert list(collated) == ['text', 'drop', 'lookups'] and list(collated['lookups']) == ['text']
        assert sum(value is not None for value in collated['lookups']['text'].values) == hits
        for key in collated['lookups']['text'].keys:
            cache.store.put(key, 'text', {'text_embeds': torch.zeros(1), 'pooled': torch.zeros(1)})
        cache.close()
    assert 'Bare has no attach_cache, so of its samples only the captions are cached.' in said


@pytest.mark.parametrize(('setting', 'message'), [
    (dict(read_only=True), "cache={'read_only': True} must name a folder"), ('', "cache='' must name a folder"),
    (dict(folder='x', readonly=True), "cache has no key 'readonly'. Did you mean 'read_only'"), (3, 'cache=3 must be')])
def test_a_wrong_setting(setting: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        open_store(load('tiny_t2i_adapter', {'cache': setting}))
    assert message in str(error.value)
