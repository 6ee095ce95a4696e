"""Every value of a config is checked against the annotation of what it is for, before anything is built."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from mmengine.config import Config
from runs import CONFIG

from diffengine_sdxl import config, limits
from diffengine_sdxl.config.check import check
from diffengine_sdxl.config.signatures import accepted, described, fits
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.registry import OPTIMIZERS, PARAM_SCHEDULERS

NAN = float('nan')
DREAMBOOTH = 'stable_diffusion_xl_lora_dreambooth'


@pytest.mark.parametrize(('hint', 'good', 'bad'), [
    (int, [3, -1], [True, 1.0, NAN, '3', None, [1], 2**63]), (float, [3, 0.5], [True, NAN, float('inf'), '3', None]),
    (bool, [True], [1, 'yes', None]), (str, ['x'], [3, None, ['x']]), (str | Path, ['x', Path('x')], [3, {}]),
    (int | None, [3, None], ['x', {}]), (Literal['a', 1], ['a', 1], ['b', True, [], None]), (Any, [3, None, {}], []),
    (Sequence[str], [['a'], (), []], ['a', ['a', 3], {}, None, {'a': 1}]),
    (tuple[int, ...], [(1, 2)], ['ab', (1, 'x')]),
    (tuple[int, str], [(1, 'a'), [1, 'a']], [(1,), ('a', 1), 3]), (list[float], [[1, 0.5]], [[NAN], 3]),
    (Mapping[str, int], [{'a': 1}, {}], [{'a': 'x'}, {1: 1}, [], 'x', None]), (dict, [{}], [[], 3]),
    (int | Sequence[int], [3, [3, 4]], ['34', [3, 'x'], None]), (re.Pattern, [re.compile('x')], ['x', {}, 3])])
def test_values_of_an_annotation(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if not fits(value, hint)] == []
    assert [value for value in bad if fits(value, hint)] == []


def test_annotations_in_words() -> None:
    assert described(int | Sequence[str] | None) == 'a whole number or a list, each entry a text; or None'
    assert described(Literal['raise', 'skip']) == "'raise' or 'skip'" and described(str | Path) == 'a text or a path'
    assert described(Mapping[str, float]) == 'a dict, each value a finite number'


def test_names_that_only_type_checkers_import() -> None:
    from diffengine_sdxl.engine.eval_loop import ValLoop
    from diffengine_sdxl.engine.optim import StepOptimWrapper
    for cls, name, hint in ((ValLoop, 'seeds', int | Sequence[int]), (StepOptimWrapper, 'accumulative_counts', int)):
        parameters = accepted(cls)
        assert parameters is not None and parameters[name].annotation == hint


@pytest.mark.parametrize(('name', 'key', 'value', 'words'), [
    (CONFIG, 'optim_wrapper.clip_grad', 1.0, 'optim_wrapper.clip_grad=1.0 must be a dict'),
    (CONFIG, 'train_dataloader.batch_size', None, 'train_dataloader.batch_size=None must be a whole number'),
    (CONFIG, 'train_dataloader.batch_size', 1e9, 'must be a whole number; write 1000000000'),
    (CONFIG, 'train_dataloader.num_workers', True, 'must be a whole number'),
    (CONFIG, 'optim_wrapper.optimizer', None, 'needs `optimizer`, which is None'),
    (CONFIG, 'optim_wrapper', {}, 'optim_wrapper has no `type`'),
    (CONFIG, 'train_dataloader.dataset', None, 'train_dataloader.dataset=None must be a dict'),
    (CONFIG, 'train_dataloader', {}, 'train_dataloader has no `dataset`'),
    (CONFIG, 'train_dataloader.dataset.transforms', None, 'transforms=None must be a list'),
    (CONFIG, 'train_dataloader.dataset.transforms.0', 5, 'must be a list, each entry a dict'),
    (CONFIG, 'train_dataloader.dataset.caption_column', 5, 'caption_column=5 must be a text or None'),
    (CONFIG, 'train_dataloader.dataset.transforms', [dict(type='Resize')], r'transforms.0 \(Resize\) needs `size`'),
    (CONFIG, 'model.sampler.guidances', None, 'guidances=None must be a list'),
    (CONFIG, 'model.sampler.guidances', [None], 'guidances'),
    (CONFIG, 'model.adapters', [], 'adapters=.* must be a dict'),
    (CONFIG, 'model.adapters', {1: dict(type='LoRA')}, "model.adapters has the key 1; write '1'"),
    (CONFIG, 'model.adapters.adapter.type', 5, 'model.adapters.adapter.type=5 must be the name of an? adapter'),
    (CONFIG, 'model.adapters.adapter.scale', NAN, 'scale=nan must be a finite number'),
    (CONFIG, 'model.trainable', 'unet', "model.trainable='unet' must be a list, each entry a text"),
    (CONFIG, 'log_level', 'LOUD', "log_level='LOUD' must be a whole number or 'DEBUG' or 'INFO'"),
    (CONFIG, 'optim_wrapper.paramwise_cfg', 5, 'paramwise_cfg=5 must be a dict'),
    (CONFIG, 'default_hooks', [], 'default_hooks=.* must be a dict'), (CONFIG, 'custom_hooks', [None], 'custom_hooks'),
    (CONFIG, 'default_hooks.checkpoint.max_keep_ckpts', 1e9, 'must be a whole number or None; write'),
    (CONFIG, 'env_cfg.mp_cfg.mp_start_method', 'x', "must be 'fork' or 'spawn' or 'forkserver'"),
    (CONFIG, 'randomness', 3, 'randomness=3 must be a dict'), (CONFIG, 'work_dir', 5, 'work_dir=5 must be a text'),
    (CONFIG, 'limits', {'image_pixel': 3}, "no such limit. Did you mean 'image_pixels'"),
    (CONFIG, 'limits', {'image_pixels': -1}, 'limits.image_pixels=-1 must be a number above 0'),
    # What metrics build, wherever they stand.
    (CONFIG, 'test_evaluator', [dict(type='CannyF1', extractor=dict(type='Cany'))], "transform. Did you mean 'Canny'"),
    (CONFIG, 'test_evaluator', dict(type='CannyF1', extractor=dict(type='Canny', lo=3)), "'lo'. Did you mean 'low'"),
    (CONFIG, 'val_evaluator', dict(metrics=[dict(type='DepthRMSE', extractor=dict(type='Depth'))]), 'needs `model`'),
    (CONFIG, 'test_evaluator.0.extractor', 'Canny', "extractor='Canny' must be a dict"),
    (CONFIG, 'test_evaluator', [dict(type='KID', real=dict(type='Shape'))], r"0.real: .*Did you mean 'Shapes'"),
    (CONFIG, 'test_evaluator', [dict(type='Memorisation', dataset=dict(type='Shapes', transforms=[dict(
        type='Crop', siz=3)]))], r"0.dataset.transforms.0 \(Crop\) has no key 'siz'. Did you mean 'size'"),
    (DREAMBOOTH, 'train_dataloader.dataset.prior', None, 'needs `prior`, which is None'),
    (DREAMBOOTH, 'model.adapters.thing.rank', 16.0, 'rank=16.0 must be a whole number or None; write 16')])
def test_a_value_of_another_type_is_refused(name: str, key: str, value: Any, words: str) -> None:
    """The message names the key, the value, and what it must be."""
    plain = config.resolve(config.load(name)).to_dict()
    *path, last = key.split('.')
    node = plain
    for part in path:
        node = node[int(part) if isinstance(node, list) else part]
    node[int(last) if isinstance(node, list) else last] = value  # type: ignore[call-overload]
    with pytest.raises(UserError, match=words):
        check(Config(plain))


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, part in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(part, (*path, key))


@pytest.mark.parametrize('name', ['shapes_composition', 'stable_diffusion_xl_textual_inversion', 'sdxl_everything'])
def test_no_value_anywhere_ends_in_a_traceback(name: str) -> None:
    """A sample; each of the values at each place of every shipped config was tried."""
    plain = config.resolve(config.load(name)).to_dict()
    random_places = random.Random(0).sample(list(places(plain)), 8)
    for path in random_places:
        for value in (None, 5, -1, 1e9, NAN, 'x', [], {}, True, 10**400, [None], {1: 2}):
            changed = Config(plain).to_dict()
            node: Any = changed
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
            try:
                check(Config(changed))
            except UserError as error:
                assert len(str(error)) < 2000


def test_values_that_a_class_of_another_package_refuses() -> None:
    """A sentence with the class and its values; what fails in a class of ours is a bug, and stays one."""
    import torch
    weight = torch.nn.Parameter(torch.ones(1))
    for settings, words in ((dict(betas=[]), r"AdamW cannot be built with betas=\[\]"), (dict(lr=-1.0), 'lr=-1.0')):
        with pytest.raises(UserError, match=words):
            OPTIMIZERS.build(dict(type='AdamW', **settings), default_args=dict(params=[weight]))
    with pytest.raises(AttributeError):
        PARAM_SCHEDULERS.build(dict(type='DiffusersLR', num_training_steps=3), default_args=dict(optimizer=None))


def test_limits_are_put_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, 'CURRENT', limits.Limits())
    config.load(CONFIG, ['limits.image_pixels=100', 'limits.download_seconds=0.5'])
    assert limits.CURRENT == limits.Limits(image_pixels=100, download_seconds=0.5)


@pytest.mark.parametrize('bases', [('a', 'b'), ('a', 'b', 'c'), ('a',)])
def test_circular_bases(bases: tuple[str, ...], tmp_path: Path) -> None:
    for name, base in zip(bases, (*bases[1:], bases[0]), strict=True):
        (tmp_path / f'{name}.py').write_text(f"_base_ = ['{base}.py']\n")
    with pytest.raises(UserError, match=f"{bases[-1]}.py' names 'a.py' in _base_, which inherits from it"):
        config.load(tmp_path / 'a.py')
