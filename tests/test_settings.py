"""A setting is declared once, in request.py: option, --set, column, JSON, Python and the page of it are the same."""

import csv
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import settings_page
from mmengine.config import Config

from diffengine_sdxl import request
from diffengine_sdxl.commands import options
from diffengine_sdxl.commands.cli import Parser, parse
from diffengine_sdxl.commands.infer import command, prompt_files
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.inference.inferencer import split_infer_cfg
from diffengine_sdxl.request import REFINER, SETTINGS, Request
from diffengine_sdxl.settings import read_text

#: Setting, with the name of an entry of a dict -> what is typed, and the value. FOLDER holds the files.
EXAMPLES: dict[str, tuple[str, Any]] = {
    # Texts are taken as they stand, whatever they look like.
    'prompt': ('007', '007'), 'prompt_2': ('[a, b', '[a, b'), 'negative_prompt': ('None', 'None'),
    'negative_prompt_2': ('(bad, worse)1.4', '(bad, worse)1.4'), 'prompt_syntax': ('compel', 'compel'),
    'name': ('1e3', '1e3'), 'image': ('FOLDER/j.png', 'FOLDER/j.png'), 'mask_image': ('FOLDER/j.png', 'FOLDER/j.png'),
    'latents': ('FOLDER/n.safetensors', 'FOLDER/n.safetensors'), 'latents_row': ('2', 2),
    'strength': ('0.7', 0.7), 'padding_mask_crop': ('8', 8), 'conditions.depth': ('FOLDER/j.png', 'FOLDER/j.png'),
    'scales.style': ('-0.5', -0.5), 'active_ranges.style': ('0,0.5', [0, 0.5]), 'height': ('64', 64),
    'width': ('72', 72), 'original_size': ('96,80', [96, 80]), 'target_size': ('[40, 56]', [40, 56]),
    'crops_coords_top_left': ('(3,5)', [3, 5]), 'negative_original_size': ('512', 512),
    'negative_target_size': ('1, 2', [1, 2]), 'negative_crops_coords_top_left': ('0,1', [0, 1]),
    'aesthetic_score': ('7', 7), 'negative_aesthetic_score': ('1.5', 1.5), 'num_inference_steps': ('4', 4),
    'timesteps': ('900,500', [900, 500]), 'sigmas': ('9.5,2,0', [9.5, 2, 0]), 'guidance_scale': ('3', 3),
    'guidance_rescale': ('0.5', 0.5), 'pag_scale': ('2.5', 2.5), 'sag_scale': ('1e-1', 0.1), 'eta': ('0', 0),
    'denoising_start': ('0.2', 0.2), 'denoising_end': ('0.8', 0.8), 'num_images_per_prompt': ('2', 2),
    'seed': ('12', 12), 'clip_skip': ('1', 1), 'refiner.strength': ('0.2', 0.2)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config, whose defaults allow every setting, and files."""
    monkeypatch.chdir(tmp_path)
    for name in ('i.png', 'j.png', 'n.safetensors'):
        (tmp_path / name).touch()
    adapters = dict(style=dict(type='LoRA', weights='x'), depth=dict(type='T2IAdapter', weights='x'))
    base = dict(type='SDXL', pretrained='x', sampler=dict(type='Sampler'))
    given = dict(prompt='a', image='i.png', mask_image='i.png', latents='i.png')
    Config(dict(model=dict(base, adapters=adapters), refiner=base, infer_cfg=given)).dump('c.py')
    return tmp_path


def requests(*words: str) -> list[Request]:
    """Return what the infer command would make."""
    errors: list[str] = []
    plan = command._plan_from_config(parse('infer', ['c.py', *words]), errors)
    assert not errors, errors
    return [job.request for job in plan.jobs()]


def test_every_setting_has_an_example() -> None:
    assert {key.partition('.')[0] for key in EXAMPLES} == {*SETTINGS}


@pytest.mark.parametrize('key', EXAMPLES)
def test_one_value_in_every_way(key: str, here: Path) -> None:
    """By option, --set, .csv, .jsonl and in Python."""
    text, value = json.loads(json.dumps(EXAMPLES[key]).replace('FOLDER', str(here)))
    name, dot, entry = key.partition('.')
    setting = {name: {entry: value} if dot else value}
    with open('rows.csv', 'w', newline='') as file:
        csv.writer(file).writerows([[key], [text]])
    Path('rows.jsonl').write_text(json.dumps(setting))
    defaults, _ = split_infer_cfg(Config.fromfile('c.py'))
    whole = Request.of(defaults, setting)
    wanted = [whole.with_seed(k) for k in range(whole.num_images_per_prompt)]
    assert whole != Request.of(defaults)
    flag = '--condition' if name == 'conditions' else f'--{name.replace("_", "-")}'
    ways = [[flag, f'{entry}={text}' if dot else text], [f'--{name}={entry}={text}' if dot else f'--{name}={text}'],
            ['--set', f'{key}={text}'], ['--prompts', 'rows.csv'], ['--prompts', 'rows.jsonl']]
    for short in SETTINGS[name].flags:
        ways.append([short, text])
    assert [(way, requests(*way)) for way in ways] == [(way, wanted) for way in ways]


def test_settings_of_the_refiner_in_every_way(here: Path) -> None:
    """All that it may have apart from the base, at once, the three ways to give its steps apart."""
    names = [name for name in REFINER if name not in ('timesteps', 'sigmas')]
    typed = {name: EXAMPLES[name] for name in names}
    with open('rows.csv', 'w', newline='') as file:
        csv.writer(file).writerows([[f'refiner.{name}' for name in names], [text for text, _ in typed.values()]])
    Path('rows.jsonl').write_text(json.dumps({'refiner': {name: value for name, (_, value) in typed.items()}}))
    pairs = [f'{name}={text}' for name, (text, _) in typed.items()]
    ways = [['--refiner', *pairs], [f'--refiner={pair}' for pair in pairs],
            ['--set', *(f'refiner.{pair}' for pair in pairs)], ['--prompts', 'rows.csv'], ['--prompts', 'rows.jsonl']]
    for way in ways:
        made, = requests(*way)
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in made.refiner.items()}
        assert given == {name: tuple(v) if isinstance(v, list) else v for name, (_, v) in typed.items()}, way


def test_dicts_and_several_images_in_one_setting(here: Path) -> None:
    """A dict as a whole, and lists of images, by --set and by repeated options."""
    scales = ('--set', 'scales=dict(style=0.5,depth=1)'), ('--set', 'scales={"style": 0.5, "depth": 1}'), (
        '--scales', 'style=0.5', 'depth=1'), ('--scales', 'style=0.5', '--set', 'scales.depth=1')
    assert [requests(*way)[0].scales for way in scales] == [dict(style=0.5, depth=1.0)] * 4
    for way in (('--image', 'i.png', '--image', 'j.png'), ('--set', 'image=[i.png,j.png]')):
        assert [one.image for one in requests('--num-images', '2', *way)] == ['i.png', 'j.png']
    for way in (('--set', 'conditions.depth.image=i.png', 'conditions.depth.mask=j.png'),
                ('--set', 'conditions.depth=dict(image=i.png,mask=j.png)'),
                ('--condition', 'depth=i.png', '--condition', 'depth.mask=j.png')):
        assert requests(*way)[0].conditions == dict(depth=dict(image='i.png', mask='j.png'))
    # What goes later on the line does not matter: --set is read after the options.
    assert requests('--set', 'seed=2', '--seed', '3')[0].seed == 2


@pytest.mark.parametrize(('words', 'sentence'), [
    (['--set', 'seed'], "--set 'seed' must have the form KEY=VALUE"), (['--set', '=3'], "--set '=3' must have the"),
    (['--set', 'seed=1', 'seed.x=2'], "--set 'seed.x': 'seed' is 1 already"),
    (['--set', 'sede=1'], "Unknown setting 'sede'. Did you mean 'seed'"), (['--set', 'a.b.c=1'], "Unknown setting 'a'"),
    (['--set', 'sigmas=[1,2'], "--set 'sigmas=[1,2': the brackets don't match"),
    (['--sigmas', '[1,2'], "--sigmas: the brackets don't match"), (['--sigmas', '1,x'], "sigmas[1]='x' must be a num"),
    (['--seed', 'x'], "seed='x' must be a whole number"), (['--height', '64.5'], 'height=64.5 must be a whole number'),
    (['--scales', 'style'], "--scales 'style' must have the form NAME=VALUE"), (['--scales', '=1'], "--scales '=1' m"),
    (['--scales', 'style=x'], "scales.style='x' must be a number"), (['--refiner', 'sede=1'], "refiner setting 'sede'"),
    (['--refiner', 'strength=(1'], "--refiner strength: the brackets don't match")])
def test_what_cannot_be_read(words: list[str], sentence: str, here: Path) -> None:
    with pytest.raises(UserError) as caught:
        requests(*words)
    assert sentence in str(caught.value)


def test_every_setting_is_in_the_help_and_on_the_page() -> None:
    """With its help and its values; the page's table is as tests/settings_page.py writes it."""
    parser = Parser('infer', '')
    options.add_infer_options(parser)
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    text = settings_page.PAGE.read_text()
    for name, one in SETTINGS.items():
        action = actions['--condition' if name == 'conditions' else f'--{name.replace("_", "-")}']
        assert set(one.flags) <= set(action.option_strings) and f'\n| `{name}` | {one.kind.values} | ' in text
        if name not in options.SPECIAL:
            assert action.dest == name and f'{one.help} ({one.kind.values})' == str(action.help) % ()
    assert settings_page.page(text) == text and settings_page.table() in text
    assert {one.kind.form for one in SETTINGS.values()} == {'text', 'file', 'number', 'list', 'dict'}


@pytest.fixture
def with_a_new_setting(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module `request` with one line more, in place of the present one for those that read it."""
    source, last = Path(request.__file__).read_text(), '    name: str = setting('
    line = "    crispness: float | None = setting(NUMBER, 'how 100% crisp', refiner='own', flags=('--crisp',))\n"
    assert source.count(last) == 1
    module = ModuleType('request_with_crispness')
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look for it
    exec(compile(source.replace(last, line + last), module.__name__, 'exec'), vars(module))
    for reader in (options, prompt_files, settings_page):
        for name, value in [*vars(reader).items()]:
            if value is vars(request).get(name, reader):
                monkeypatch.setattr(reader, name, vars(module)[name])
    return module


def test_a_new_setting_is_one_line(with_a_new_setting: ModuleType, tmp_path: Path) -> None:
    """A line more in Request, and it can be given in every way, is in the help, on the page, and refused by name."""
    args = parse('infer', ['C', '--crisp', '0.5', '--refiner', 'crispness=2', '--set', 'crispness=3'])
    assert options.given_settings(args) == {'crispness': 0.5, 'refiner': {'crispness': 2}}
    assert options.set_settings(args.set) == {'crispness': 3}
    parser = Parser('infer', '')
    options.add_infer_options(parser)
    text = ' '.join(parser.format_help().split())
    assert '--crisp N, --crispness N' in text and 'how 100% crisp (number)' in text
    for name, rows in (('rows.csv', 'crispness,refiner.crispness\n0.5,2\n'),
                       ('rows.jsonl', '{"crispness": 0.5, "refiner": {"crispness": 2}}')):
        (tmp_path / name).write_text(rows)
        made = prompt_files.read_prompts(tmp_path / name)[0].request
        assert made is not None and (made.crispness, made.for_refiner().crispness) == (0.5, 2.0)  # type: ignore
    (tmp_path / 'bad.csv').write_text('crispnes\n1\n')
    with pytest.raises(UserError, match="Unknown column 'crispnes' .*Did you mean 'crispness'"):
        prompt_files.read_prompts(tmp_path / 'bad.csv')
    with pytest.raises(UserError, match="crispness='x' must be a number"):
        with_a_new_setting.Request.of({'crispness': 'x'})
    assert '\n| `crispness` | number | how 100% crisp |\n' in settings_page.table()


def test_read_text() -> None:
    """By the form that a setting declares; what cannot be read stays text, for the check to name."""
    for form, text, value in (('text', '[1', '[1'), ('file', '1', '1'), ('number', '0x10', 16), ('number', 'x', 'x'),
                              ('list', '1,x', [1, 'x']), ('list', '5', 5), ('list', ' (1,2)', (1, 2)),
                              ('dict', 'dict(a=1)', {'a': 1}), ('list', 'None', None)):
        assert read_text(form, 'k', text) == value
    with pytest.raises(UserError, match='^k: the brackets'):
        read_text('list', 'k', '(1,2')
