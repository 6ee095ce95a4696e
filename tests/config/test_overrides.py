"""Overrides: lists appended to and reached into by type, dicts as values, one override after the other."""

import itertools
from typing import Any

import pytest

from diffengine_sdxl import config
from diffengine_sdxl.config.references import to_plain
from diffengine_sdxl.errors import UserError

FILL50K = 'stable_diffusion_xl_t2i_adapter_fill50k'
CANNY = 'stable_diffusion_xl_t2i_adapter_canny'
TRANSFORMS, GUIDANCES = 'train_dataloader.dataset.transforms', 'model.sampler.guidances'
EMA = {'type': 'EMAHook', 'decay': 0.999}


def overridden(*options: str, path: str, name: str = FILL50K) -> Any:
    """Return what is at `path` of a config with these overrides."""
    cfg = config.load(name, options)
    node = to_plain(cfg)
    for part in path.split('.'):
        node = node[part]
    config.resolve(cfg)
    return node


@pytest.mark.parametrize(('options', 'added'), [
    (['custom_hooks+=dict(type=EMAHook,decay=0.999)'], [EMA]),
    (["custom_hooks+={'type': 'EMAHook', 'decay': 0.999}"], [EMA]),
    (['custom_hooks+=dict(type=EMAHook,decay=0.999)', 'custom_hooks+=dict(type=ProgressHook)'],
     [EMA, {'type': 'ProgressHook'}]),
    (['custom_hooks+=[dict(type=EMAHook,decay=0.999), dict(type=ProgressHook)]'], [EMA, {'type': 'ProgressHook'}]),
    (['custom_hooks=[dict(type=ProgressHook)]', 'custom_hooks+=dict(type=EMAHook,decay=0.999)'],
     [{'type': 'ProgressHook'}, EMA]),
    (['custom_hooks=None', 'custom_hooks+=dict(type=EMAHook,decay=0.999)'], [EMA]),
    (['custom_hooks+=dict(type=EMAHook)', 'custom_hooks.EMAHook.decay=0.999'], [EMA]), (['custom_hooks+=[]'], [])])
def test_appended_hooks(options: list[str], added: list[Any]) -> None:
    assert overridden(*options, path='custom_hooks') == added


def test_a_list_that_a_config_does_not_have_yet() -> None:
    """`tiny_t2i_adapter` names no `model.trainable`; and a dict in Python takes one value, or several, too."""
    assert 'trainable' not in config.load('tiny_t2i_adapter').model
    assert overridden('model.trainable+=vae', 'model.trainable+=unet', path='model.trainable') == ['vae', 'unet']
    for value in (EMA, [EMA]):
        assert to_plain(config.load(FILL50K, {'custom_hooks+': value}).custom_hooks) == [EMA]


def test_entries_by_type_and_by_number() -> None:
    for entry, key in (('ComputeTimeIds', 3), ('3', 3)):
        transforms = overridden(f'{TRANSFORMS}.{entry}.crops_coords_top_left=(0,0)', path=TRANSFORMS)
        assert transforms[key] == {'type': 'ComputeTimeIds', 'crops_coords_top_left': [0, 0]}
        assert [t['type'] for t in transforms] == ['Resize', 'Crop', 'CaptionDrop', 'ComputeTimeIds', 'PackInputs']
        assert transforms[0]['size'] == '$image_size'
    assert overridden(f'{GUIDANCES}.CFG.scale=3', path=GUIDANCES) == [{'type': 'CFG', 'scale': 3}]
    both = overridden(f'{TRANSFORMS}.Resize.size=32', f'{TRANSFORMS}.0.interpolation=lanczos', path=TRANSFORMS)
    assert both[0] == {'type': 'Resize', 'size': 32, 'interpolation': 'lanczos'}
    # A tuple, a value, and None, which takes an entry out.
    assert overridden('optim_wrapper.optimizer.betas.0=0.5', path='optim_wrapper.optimizer.betas') == [0.5, 0.999]
    less = overridden(f'{TRANSFORMS}.CaptionDrop=None', f'{TRANSFORMS}.Crop=None', path=TRANSFORMS)
    assert [t['type'] for t in less] == ['Resize', 'ComputeTimeIds', 'PackInputs']


def test_appending_and_changing_an_entry_go_together() -> None:
    """In any order, for the entries that were there; the appended one is reached once it is there."""
    wanted = [{'type': 'CFG', 'scale': 3}, {'type': 'SAG', 'scale': 0.5}]
    for options in itertools.permutations([f'{GUIDANCES}.CFG.scale=3', f'{GUIDANCES}+=dict(type=SAG,scale=0.5)']):
        assert overridden(*options, path=GUIDANCES) == wanted
    assert overridden(f'{GUIDANCES}+=dict(type=SAG)', f'{GUIDANCES}.SAG.scale=0.5', f'{GUIDANCES}.0.scale=3',
                      path=GUIDANCES) == wanted
    assert overridden(f'{GUIDANCES}+=dict(type=SAG)', f'{GUIDANCES}=[dict(type=PAG)]', path=GUIDANCES) == [
        {'type': 'PAG'}]


def test_values_in_python_stay_as_they_are() -> None:
    """So that the same overrides can be used again; and the config does not change with them."""
    hooks = [dict(EMA)]
    options = {'model.objective.loss': {'_delete_': True, 'type': 'L1Loss'}, f'{GUIDANCES}.CFG': {'scale': 3},
               'optim_wrapper.optimizer': {'_delete_': True, 'type': 'SGD', 'lr': 1.0},
               'custom_hooks': hooks, 'custom_hooks+': EMA}
    first = config.load(FILL50K, options)
    assert to_plain(config.load(FILL50K, options)) == to_plain(first)  # SGD would not take AdamW's betas
    assert hooks == [EMA] and first.model.objective.loss == {'type': 'L1Loss'}
    hooks[0]['decay'] = 0.5
    assert first.custom_hooks == [EMA, EMA]


def test_dicts_as_values() -> None:
    """Merged into a dict, in place of None or nothing; with _delete_ in place of the dict."""
    sampler = overridden('model.sampler=dict(num_inference_steps=3,scheduler=dict(type=DDIMScheduler))',
                         path='model.sampler')
    assert sampler == {'type': 'Sampler', 'num_inference_steps': 3, 'guidances': [{'type': 'CFG', 'scale': 5.0}],
                       'scheduler': {'type': 'DDIMScheduler'}}
    assert overridden('default_hooks.ema=dict(type=EMAHook,decay=0.999)', path='default_hooks.ema') == EMA
    assert overridden('model.adapters.style=dict(type=LoRA,blocks={"up_blocks.0": dict(rank=4)})'.replace(
        'dict(rank=4)', '{"rank": 4}'), path='model.adapters.style') == {'type': 'LoRA',
                                                                         'blocks': {'up_blocks.0': {'rank': 4}}}
    clipped = ['optim_wrapper.clip_grad=None', 'optim_wrapper.clip_grad=dict(max_norm=2)',
               'optim_wrapper.clip_grad.max_norm=2']
    for options in (clipped[:2], clipped[::2]):
        assert overridden(*options, path='optim_wrapper.clip_grad') == {'max_norm': 2}
    assert overridden('model.objective.loss=dict(_delete_=True,type=L1Loss)', path='model.objective.loss') == {
        'type': 'L1Loss'}
    guided = overridden(f'{GUIDANCES}.CFG=dict(_delete_=True,type=PAG,layers=[mid,down_blocks.1])', path=GUIDANCES)
    assert guided == [{'type': 'PAG', 'layers': ['mid', 'down_blocks.1']}]


def test_a_reference_in_a_list() -> None:
    """'$condition' is an entry without a type of its own: reached by its key, or replaced by its number."""
    transforms = overridden(f'{TRANSFORMS}.Resize.size=64', 'condition.low=3', path=TRANSFORMS, name=CANNY)
    place = transforms.index('$condition')
    assert transforms[0]['size'] == 64
    resolved = config.resolve(config.load(CANNY, ['condition.low=3', f'{TRANSFORMS}+=dict(type=PackInputs)']))
    assert resolved.train_dataloader.dataset.transforms[place].low == 3
    replaced = overridden(f'{TRANSFORMS}.{place}=dict(type=Canny,low=7)', path=TRANSFORMS, name=CANNY)
    assert replaced[place] == {'type': 'Canny', 'low': 7} and len(replaced) == len(transforms)


@pytest.mark.parametrize(('options', 'sentence'), [
    ([f'{GUIDANCES}.cfg.scale=3'], f"--cfg-options '{GUIDANCES}.cfg.scale': {GUIDANCES} is a list of 1 (CFG); 'cfg' is "
                                   "neither an index of it nor a type in it. Did you mean 'CFG'?"),
    ([f'{GUIDANCES}+=dict(type=CFG)', f'{GUIDANCES}.CFG.scale=3'], 'is a list of 2 (CFG, CFG); 2 of them are '
                                                                   "'CFG'; name one by its number, from 0."),
    ([f'{GUIDANCES}.-1.scale=3'], "'-1' is neither"), ([f'{GUIDANCES}.1.scale=3'], "'1' is neither"),
    ([f'{GUIDANCES}.²=3'], "'²' is neither"), ([f'{TRANSFORMS}.Resiez.size=3'], "Did you mean 'Resize'?"),
    (['optim_wrapper.optimizer.betas.first=0.5'], "betas is a list of 2; 'first' is neither"),
    (['resolution+=3'], "--cfg-options 'resolution+=...' appends to a list, and resolution is 1024."),
    (['model.sampler+=3'], "--cfg-options 'model.sampler+=...' appends to a list, and model.sampler is {"),
    (['nosuch+=3'], "the config has no key 'nosuch'"), (['custom_hook+=3'], "Did you mean 'custom_hooks'"),
    (['model.nosuch+=3'], "model (SDXL) has no key 'nosuch'"), (['+=3'], "--cfg-options '+=3' must have the form"),
    (['custom_hooks+=EMAHook'], "custom_hooks=['EMAHook'] must be a list, each entry a dict; or None."),
    (['custom_hooks+=dict(type=EmaHook)'], "Did you mean 'EMAHook'"),
    (['custom_hooks+=dict(type=EMAHook,decai=1)'], "Did you mean 'decay'"),
    ([f'{GUIDANCES}.0=5'], f'{GUIDANCES}=[5] must be a list, each entry a dict.'),
    (['model.sampler=3', 'model.sampler.type=x'], "model.sampler is 3 and has no 'type'"),
    (['model.adapters.new=dict(scale=2)'], 'model.adapters.new has no `type`'),
    (['model.sampler=dict(type=Sampler'], "--cfg-options 'model.sampler=dict(type=Sampler': the brackets")])
def test_refused(options: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load(FILL50K, options)
    assert sentence in str(caught.value)
    assert str(caught.value).count('Did you mean') <= 1
