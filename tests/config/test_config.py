"""Configs: finding, reading, overriding, dropping consumed pieces, resolving; unknown keys are refused by name."""

import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from runs import CONFIG, assert_same_run, build, curves, train

from diffengine_sdxl import config
from diffengine_sdxl.config.load import RUNNER_KEYS
from diffengine_sdxl.config.references import references, to_plain
from diffengine_sdxl.config_files import installed_configs
from diffengine_sdxl.errors import UserError

FILL50K = 'stable_diffusion_xl_t2i_adapter_fill50k'
PIECES = ('models/sdxl_base', 'adapters/t2i_adapter', 'objectives/t2i_adapter', 'samplers/euler', 'datasets/fill50k',
          'schedules/adamw_15k')


def write(folder: Path, text: str, name: str = 'mine.py', base: str = CONFIG) -> Path:
    """Write a config that extends an installed one."""
    path = folder / name
    path.write_text(f'_base_ = [{str(config.find(base))!r}]\n{textwrap.dedent(text)}')
    return path


def refused(name: str | Path, *options: str) -> str:
    """Return the message with which a config or its overrides are refused."""
    with pytest.raises(UserError) as caught:
        config.load(name, options)
    return str(caught.value)


@pytest.mark.parametrize('path', installed_configs(), ids=lambda p: p.stem)
def test_every_config_is_read_checked_and_resolved(path: Path) -> None:
    cfg = config.load(path)
    assert config.resolve(config.load(path.stem)).to_dict() == config.resolve(cfg).to_dict()
    # A config for inference only has no runner, and needs no scope.
    inference_only = path.parent.name == 'infer'
    assert cfg.get('default_scope') == (None if inference_only else 'diffengine_sdxl')
    assert set(cfg) <= {*RUNNER_KEYS, *references(cfg.to_dict())} and (not inference_only or cfg.infer_cfg)
    assert '$' not in str(config.resolve(cfg).to_dict())


def test_an_error_of_python_names_its_line(tmp_path: Path) -> None:
    """In the file of several where it is; and what a text that stands for a key is."""
    path = write(tmp_path, 'model = dict(\n    scale=1 / 0)')
    heir = write(tmp_path, 'resolution = 32', 'heir.py', str(path))
    assert refused(heir) == (f"The config '{heir}' cannot be read: '{path}', line 3 (`scale=1 / 0)`): "
                             'ZeroDivisionError: division by zero')
    path.write_text('resolution = 3\nmodel = dict(\n')
    assert refused(heir).endswith(f"'{path}', line 2 (`model = dict(`): SyntaxError: '(' was never closed")
    path = write(tmp_path, "val_dataloader = dict(dataset=dict(\n    _base_.test_dataloader.dataset, split='val'))")
    assert ("is required. `_base_.test_dataloader.dataset` is the text '$train_dataloader.dataset'; write "
            '`_base_.train_dataloader.dataset` to') in refused(path)


def test_what_replaces_nothing_may_say_so(tmp_path: Path) -> None:
    """`_delete_` in dicts that no base has, at any depth, in files and overrides, is dropped."""
    path = write(tmp_path, "val_dataloader = dict(_base_.test_dataloader, _delete_=True, dataset=dict(_delete_=True, "
                           "**_base_.train_dataloader.dataset))")
    cfg = config.load(path, {'env_cfg.dist_cfg': dict(_delete_=True, backend='gloo')})
    assert cfg.val_dataloader.dataset == cfg.train_dataloader.dataset and '_delete_' not in cfg.pretty_text
    assert cfg.val_dataloader.sampler == cfg.test_dataloader.sampler


def test_found_by_path_and_by_base_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    installed = config.find(f'{FILL50K}.py')
    assert installed == config.find(FILL50K) == config.find(installed) == config.find(str(installed))
    # As it is written in a checkout, from anywhere.
    for folder in ('t2i_adapter', 'configs/t2i_adapter'):
        assert config.find(f'{folder}/{FILL50K}.py') == installed
    # A file in the current folder precedes an installed one.
    local = write(tmp_path, 'resolution = 32', f'{CONFIG}.py')
    assert config.find(f'{CONFIG}.py').resolve() == local and config.find(CONFIG) != local


@pytest.mark.parametrize('name', [f'{FILL50K}l.py', FILL50K[:-1], FILL50K.upper()])
def test_an_unknown_name_gets_the_nearest(name: str) -> None:
    assert f"'{name}'" in refused(name) and f"Did you mean '{FILL50K}'" in refused(name)
    assert 'no config file' in refused(f'nowhere/{FILL50K}.py')


def test_overrides_reach_dicts_and_lists() -> None:
    cfg = config.load(FILL50K, ['model.adapters.adapter.scale=0.5', 'model.sampler.guidances.0.scale=7.5',
                                'train_dataloader.dataset.transforms.0.interpolation=lanczos',
                                'optim_wrapper.optimizer.betas=(0.8,0.9)', 'model.vae=None', 'custom_hooks=[]',
                                'model.trainable=[unet,vae]', 'model.pretrained=a=b'])
    assert cfg.model.adapters.adapter.scale == 0.5 and cfg.model.sampler.guidances[0].scale == 7.5
    assert cfg.train_dataloader.dataset.transforms[0].interpolation == 'lanczos'
    assert tuple(cfg.optim_wrapper.optimizer.betas) == (0.8, 0.9) and cfg.model.vae is None
    assert cfg.model.trainable == ['unet', 'vae'] and cfg.model.pretrained == 'a=b'
    # The next load does not see them.
    assert config.load(FILL50K).model.adapters.adapter.scale == 1.0


def test_overrides_add_keys_and_parts() -> None:
    """Those that the file omits or sets to None, also several levels at once."""
    cfg = config.load(CONFIG, ['optim_wrapper.paramwise_cfg.lr.adapter=0.5', 'model.dtype.vae=float16',
                               'model.adapters.two.type=T2IAdapter', 'model.adapters.two.scale=2',
                               'default_hooks.ema.type=EMAHook', 'auto_scale_lr.enable=True'])
    assert cfg.optim_wrapper.paramwise_cfg.lr.adapter == 0.5 and cfg.model.dtype == dict(vae='float16')
    assert cfg.model.adapters.two == dict(type='T2IAdapter', scale=2) and cfg.default_hooks.ema.type == 'EMAHook'
    cfg = config.load(CONFIG, {'optim_wrapper.clip_grad': None})
    assert cfg.optim_wrapper.clip_grad is None


def test_a_key_that_lost_its_last_reader_is_dropped(tmp_path: Path) -> None:
    """A config that replaces the transforms, in a file or by an override, drops keys that only they referred to."""
    transforms = [dict(type='Resize', size=64), dict(type='PackInputs')]
    path = write(tmp_path, f'train_dataloader = dict(dataset=dict(transforms={transforms!r}))')
    assert 'proportion_empty_prompts' not in config.load(path)
    cfg = config.load(CONFIG, {'train_dataloader.dataset.transforms': transforms})
    assert 'proportion_empty_prompts' not in cfg
    cfg.dump(str(tmp_path / 'dumped.py'))
    config.load(tmp_path / 'dumped.py')


def test_none_removes_an_adapter(tmp_path: Path, tiny: dict[str, Any]) -> None:
    path = write(tmp_path, "model = dict(adapters=dict(second=dict(type='T2IAdapter')))")
    assert list(build(tmp_path / 'both', tiny, name=str(path)).model.adapters) == ['adapter', 'second']
    one = build(tmp_path / 'one', {**tiny, 'model.adapters.adapter': None}, name=str(path))
    assert list(one.model.adapters) == ['second']


def test_parts_follow_a_top_level_key() -> None:
    """`resolution` is overridden after the bases were read, and transforms and samples follow."""
    resolved = config.resolve(config.load(FILL50K, ['resolution=128', 'mixed_precision=no']))
    transforms = {t['type']: t for t in resolved.train_dataloader.dataset.transforms}
    assert transforms['Resize']['size'] == transforms['Crop']['size'] == resolved.default_hooks.samples.size == 128
    assert resolved.model.mixed_precision == resolved.optim_wrapper.mixed_precision == 'no'


def test_references_reach_into_keys_and_not_in_circles(tmp_path: Path) -> None:
    path = write(tmp_path, """
        a = dict(b=[dict(c=3)], size='$resolution')
        model = dict(adapters=dict(adapter=dict(in_channels='$a.size')), null_prompt='$word')
        word = 'zeros'
        """)
    cfg = config.resolve(config.load(path))
    assert cfg.model.adapters.adapter.in_channels == 64 and cfg.model.null_prompt == 'zeros'
    assert 'refers to itself' in refused(write(tmp_path, "a = '$b'\nb = '$a'\nresolution = '$a'"))


def test_an_unknown_reference_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "model = dict(vae='$resolutoin')")
    assert "'$resolutoin'" in refused(path) and "Did you mean 'resolution'" in refused(path)


def test_consumed_pieces_are_gone_and_cannot_be_overridden() -> None:
    cfg = config.load(FILL50K)
    assert not {'t2i_adapter', 'objective', 'sampler'} & set(cfg)
    text = refused(FILL50K, 't2i_adapter.scale=0.5')
    assert "'t2i_adapter'" in text and 'model.adapters.adapter' in text
    assert 'model.sampler' in refused(FILL50K, 'sampler.num_inference_steps=3')
    assert 'model.objective' in refused(FILL50K, 'objective.loss.type=L1Loss')


@pytest.mark.parametrize(('option', 'words'), [
    ('resolutoin=64', "'resolutoin'.*Did you mean 'resolution'"),
    ('train_cgf.max_iters=4', "'train_cgf'.*Did you mean 'train_cfg'"),
    ('adapters[0].scale=1', "no key 'adapters'"),
    ('train_cfg.max_iter=4', "train_cfg.*'max_iter'.*Did you mean 'max_iters'"),
    ('model.pretraned=x', "model.*'pretraned'.*Did you mean 'pretrained'"),
    ('model.adapters.adaptor.scale=1', "model.adapters has no 'adaptor'.*Did you mean 'adapter'"),
    ('model.adapters.adaptor=None', "model.adapters has no 'adaptor'.*Did you mean 'adapter'"),
    ('model.adapters.adapter.scael=1', "model.adapters.adapter.*'scael'.*Did you mean 'scale'"),
    ('model.adapters.new.scale=1', "model.adapters has no 'new'"),
    ('model.objective.noise.strength=1', "model.objective.noise \\(PlainNoise\\) has no key 'strength'"),
    ('model.sampler.guidances.0.scal=1', "model.sampler.guidances.0.*'scal'.*Did you mean 'scale'"),
    ('model.sampler.guidances.3.scale=1', r"guidances is a list of 1 \(CFG\); '3' is neither"),
    ('model.sampler.guidances.3=1', r"guidances is a list of 1 \(CFG\); '3' is neither"),
    ('model.pretrained.folder=x', 'model.pretrained'),
    ('resolution.x=64', 'resolution'),
    ('default_hooks.checkpiont.interval=1', "default_hooks has no 'checkpiont'.*Did you mean 'checkpoint'"),
    ('default_hooks.sampels=None', "default_hooks has no 'sampels'.*Did you mean 'samples'"),
    ('default_hooks.checkpoint.intervall=1', "'intervall'.*Did you mean 'interval'"),
    ('train_dataloader.num_worker=1', "train_dataloader has no key 'num_worker'.*Did you mean 'num_workers'"),
    ('train_dataloader.dataset.sorce=x', "'sorce'.*Did you mean 'source'"),
    ('train_dataloader.dataset.transforms.0.sizes=1', "'sizes'.*Did you mean 'size'"),
    ('optim_wrapper.optimizer.lrr=1', "'lrr'.*Did you mean 'lr'"),
    ('optim_wrapper.acumulative_counts=1', "Did you mean 'accumulative_counts'"),
    ('param_scheduler.num_warmup=1', "Did you mean 'num_warmup_steps'"),
    ('randomness.sed=1', "randomness has no key 'sed'.*Did you mean 'seed'"),
    ('env_cfg.cudnn_benchmrk=1', "Did you mean 'cudnn_benchmark'"),
    ('env_cfg.mp_cfg.mp_start_methd=fork', "Did you mean 'mp_start_method'"),
    ('optim_wrapper.loss_scale.init_scal=1', "Did you mean 'init_scale'"),
    ('visualizer.vis_backends.0.save_dirr=x', "Did you mean 'save_dir'"),
    ('auto_scale_lr.enabled=True', "Did you mean 'enable'"),
    ('train_cfg.type=StepLop', "train_cfg.*type='StepLop' is not a known loop.*Did you mean 'StepLoop'"),
    ('model.adapters.adapter.type=T2iAdapter', "Did you mean 'T2IAdapter'"),
    ('model.objective.loss.type=L3Loss', "Did you mean 'L2Loss'|Did you mean 'L1Loss'"),
    ('default_hooks.samples=off', "default_hooks.samples='off'.*dict with a `type`"),
    ('model.objective.loss=L1Loss', "model.objective.loss='L1Loss'.*dict with a `type`"),
    ('nonsense', 'KEY=VALUE'), ('=3', 'KEY=VALUE'),
])
def test_an_unknown_override_is_refused(option: str, words: str) -> None:
    """At any depth, with the nearest name."""
    text = refused(CONFIG, option)
    assert re.search(words, text, re.DOTALL), text


@pytest.mark.parametrize(('text', 'words'), [
    ('resolutoin = 64', "sets 'resolutoin', which nothing reads. Did you mean 'resolution'"),
    ('model = dict(pretraned=None)', "Did you mean 'pretrained'"),
    ('model = dict(adapters=dict(two=dict(scale=1)))', "model.adapters.two has no `type`"),
    ("custom_hooks = [dict(type='EmaHook')]", "Did you mean 'EMAHook'"),
    ('custom_hooks = [dict(decay=0.5)]', 'type'),
    ("custom_hooks = [dict(type='EMAHook', decai=0.5)]", "Did you mean 'decay'"),
    ('train_dataloader = dict(dataset=dict(transforms=[dict(size=3)]))', 'transforms.0.*type'),
    ("model = dict(adapters={'a': dict(type='T2IAdapter'), 'a': None})", "line 2: the dict has the key 'a' twice"),
    ("model = dict(adapters=dict(a=None, a=None))", 'SyntaxError: keyword argument repeated: a'),
    ("model = dict(type='SDXXL')", "Did you mean 'SDXL'"),
    ("param_scheduler = [dict(type='CosineAnealingLR')]", "Did you mean 'CosineAnnealingLR'"),
])
def test_unknown_keys_in_a_file_are_refused(text: str, words: str, tmp_path: Path) -> None:
    message = refused(write(tmp_path, text))
    assert re.search(words, message, re.DOTALL), message


def test_a_transform_behind_a_reference_is_checked() -> None:
    name = 'stable_diffusion_xl_t2i_adapter_canny'
    assert "'lw'" in refused(name, 'condition.lw=3') and "Did you mean 'low'" in refused(name, 'condition.lw=3')
    assert "Did you mean 'Canny'" in refused(name, 'condition.type=Cany')
    assert config.resolve(config.load(name, ['condition.low=3'])).train_dataloader.dataset.transforms[2].low == 3


@pytest.mark.parametrize('optimizer', ['AdamW8bit', 'Prodigy', 'Adafactor', 'TorchAdafactor', 'SGD'])
def test_optimizers_take_their_own_arguments(optimizer: str) -> None:
    """Also those that are functions around a package that is imported late."""
    cfg = config.load(CONFIG, {'optim_wrapper.optimizer': dict(_delete_=True, type=optimizer, lr=1.0, weight_decay=0)})
    assert cfg.optim_wrapper.optimizer == dict(type=optimizer, lr=1.0, weight_decay=0)


@pytest.mark.parametrize(('text', 'words'), [
    ('model = dict(', 'SyntaxError'), ('a = 1 / 0', 'ZeroDivisionError'), ("_base_ = ['nowhere.py']", 'nowhere.py'),
    ("custom_imports = dict(imports=['no_such_module_here'], allow_failed_imports=False)", 'no_such_module_here'),
    ('model = dict(objective=_base_.objectiv)', 'objectiv'),
    ("_base_ = ['{base}', '{base}']", 'Duplicate key'),
])
def test_a_file_that_cannot_be_read_is_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / 'mine.py'
    head = '' if text.startswith('_base_ =') else f'_base_ = [{str(config.find(CONFIG))!r}]\n'
    path.write_text(head + text.replace('{base}', str(config.find(FILL50K))))
    assert str(path) in refused(path) and words in refused(path)


def test_a_dumped_config_is_the_same_config(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """The config in a work dir can be run again, and still follows an override of `resolution`."""
    options = {**tiny, 'model.adapters.adapter.scale': 0.5, 'optim_wrapper.optimizer.betas': (0.8, 0.9),
               'randomness.deterministic': True}  # for a GPU
    runner = train(tmp_path / 'one', options)
    again = config.load(tmp_path / 'one' / f'{CONFIG}.py')
    assert to_plain(config.resolve(again)) == {**to_plain(config.resolve(runner.cfg))}
    again = config.resolve(config.load(tmp_path / 'one' / f'{CONFIG}.py', ['resolution=128']))
    assert again.train_dataloader.dataset.transforms[0].size == 128
    two = train(tmp_path / 'two', {}, name=str(tmp_path / 'one' / f'{CONFIG}.py'))
    assert two.seed == runner.seed
    assert_same_run(tmp_path / 'one', tmp_path / 'two', 4)


def test_custom_imports(tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run uses a loss from `custom_imports`, whose keys are checked like ours."""
    (tmp_path / 'my_own_losses.py').write_text(textwrap.dedent("""
        from diffengine_sdxl.registry import LOSSES
        @LOSSES.register_module(force=True)
        class HalfLoss:
            def __init__(self, factor=0.5):
                self.factor = factor
            def __call__(self, prediction, target, t, schedule):
                return self.factor * (prediction - target).square()
        """))
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(tmp_path, """
        custom_imports = dict(imports=['my_own_losses'], allow_failed_imports=False)
        model = dict(objective=dict(loss=dict(_delete_=True, type='HalfLoss')))
        """)
    train(tmp_path / 'half', {**tiny, 'train_cfg.max_iters': 1}, name=str(path))
    train(tmp_path / 'full', {**tiny, 'train_cfg.max_iters': 1})
    assert curves(tmp_path / 'half')[0]['loss'] == pytest.approx(curves(tmp_path / 'full')[0]['loss'] / 2, rel=1e-6)
    assert "Did you mean 'factor'" in refused(path, 'model.objective.loss.factr=1')
    # The dumped config imports it again.
    config.load(tmp_path / 'half' / 'mine.py')


def test_a_config_from_the_pieces(tmp_path: Path) -> None:
    """A config composes pieces by name; one piece may be used twice, with changes."""
    folder = config.find(FILL50K).parents[1] / '_base_'
    bases = [str(folder / f'{piece}.py') for piece in PIECES]
    path = tmp_path / 'two.py'
    path.write_text(textwrap.dedent(f"""
        _base_ = {bases!r}
        model = dict(adapters=dict(one=_base_.t2i_adapter, two=dict(_base_.t2i_adapter, scale=0.5)),
                     objective=_base_.objective, sampler=_base_.sampler)
        """))
    cfg = config.load(path)
    assert [a.scale for a in cfg.model.adapters.values()] == [1.0, 0.5]
    assert 'default_hooks' not in cfg
    config.load(path, ['default_hooks.checkpoint=None', 'randomness.seed=3'])


@pytest.mark.parametrize(('options', 'words'), [
    ({'model': None}, 'no `model`'), ({'model.objective': None}, 'model.objective is not set'),
    ({'train_dataloader': None, 'test_dataloader': None}, 'no `train_dataloader`'),
    ({'optim_wrapper': None}, 'no `optim_wrapper`'),
    ({'model.adapters.adapter': None}, 'Nothing to train'),
    ({'train_cfg.max_iters': 0}, 'max_iters=0'), ({'train_cfg.max_iters': None}, 'max_iters'),
    ({'train_cfg.max_iters': 'many'}, "max_iters='many'"),
    ({'default_hooks.checkpoint.interval': 0}, 'interval=0'),
    ({'custom_hooks': [dict(type='EMAHook', decay=1.0)]}, 'decay=1.0'),
    ({'param_scheduler.by_epoch': True}, 'by_epoch'),
    ({'optim_wrapper.clip_grad.max_nrm': 1}, "Did you mean 'max_norm'"),
    ({'model.sampler.scheduler.type': 'EulerDiscretScheduler'}, "Did you mean 'EulerDiscreteScheduler'"),
    ({'model.sampler.scheduler.use_karas_sigmas': True}, "Did you mean 'use_karras_sigmas'"),
])
def test_invalid_training_is_refused_before_the_first_step(options: dict[str, Any], words: str, tmp_path: Path,
                                                           tiny: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=words):
        train(tmp_path / 'run', {**tiny, **options})
    assert not list((tmp_path / 'run').glob('step*'))


def test_a_base_may_be_an_installed_config(tmp_path: Path) -> None:
    """`_base_` reaches installed configs and pieces from any folder."""
    path = tmp_path / 'mine.py'
    path.write_text("_base_ = ['diffengine_sdxl::t2i_adapter/stable_diffusion_xl_t2i_adapter_fill50k.py']\n"
                    'resolution = 512\nmodel = dict(adapters=dict(adapter=dict(scale=0.5)))\n')
    mine, theirs = config.resolve(config.load(path)), config.resolve(config.load(FILL50K))
    assert mine.model.adapters.adapter.scale == 0.5 and mine.train_dataloader.dataset.transforms[0].size == 512
    assert 't2i_adapter' not in mine
    mine.model.adapters.adapter.scale, theirs.resolution = 1.0, 512
    assert to_plain(mine.model) == to_plain(theirs.model) and mine.resolution == theirs.resolution
    path.write_text("_base_ = ['no_such_package::x.py']\n")
    assert 'no_such_package::x.py' in refused(path)


@pytest.mark.parametrize(('option', 'word'), [
    ('optim_wrapper.optimizer.lr=abc', 'optim_wrapper.optimizer.lr'), ('train_dataloader.batch_size=two', 'batch_size'),
    ('model.gradient_checkpointing=yes', 'True or False'), ('model.sampler.guidances=few', 'model.sampler.guidances'),
    ('train_dataloader.num_workers=few', 'num_workers')])
def test_text_in_place_of_a_number_is_refused(option: str, word: str) -> None:
    message = refused(FILL50K, option)
    assert word in message and repr(option.partition('=')[2]) in message


def test_modules_named_in_an_override_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'imported_by_override.py').write_text('seen = True\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    config.load(FILL50K, ['custom_imports.imports=[imported_by_override]'])
    assert sys.modules['imported_by_override'].seen
    assert 'nomodule' in refused(FILL50K, 'custom_imports.imports=[nomodule]')


def test_text_of_an_override_keeps_its_spaces_and_commas() -> None:
    """mmengine's parser would make it 'aredcircle'."""
    parsed = config.parse_overrides(['a=[a red circle, a blue one]', 'b=/my data/base', 'c=red, round', 'd=(0.9,0.99)',
                                     "e=[[1,2],['x, y']]", 'f=1e-5', 'g=None', 'h=true', "i=[it's, b]", 'j=', 'k=[]',
                                     "l={'type': 'EMAHook'}"])
    assert parsed == {'a': ['a red circle', 'a blue one'], 'b': '/my data/base', 'c': 'red, round', 'd': (0.9, 0.99),
                     'e': [[1, 2], ['x, y']], 'f': 1e-5, 'g': None, 'h': True, 'i': ["it's", 'b'], 'j': '', 'k': [],
                     'l': {'type': 'EMAHook'}}


@pytest.mark.parametrize('item', ['a=[a cat (sitting,b]', 'a=[x', 'a=[b),c]', "a=['x,b]", 'a'])
def test_overrides_whose_brackets_do_not_match(item: str) -> None:
    with pytest.raises(UserError, match='cfg-options'):
        config.parse_overrides([item])

