"""What tools/infer.py is given: strangers' pictures, adapters, conditions and weights, mistakes."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from asking import Here, adapters, by_hand, pictures
from PIL import Image
from runs import train

from diffengine_sdxl.commands.infer.provenance import write_png
from diffengine_sdxl.testing import write_tiny_sdxl

SIZE = ['--height', '48', '--width', '64']


@pytest.mark.parametrize(('place', 'value', 'sentence'), [
    (('model', 'type'), 'os.system', "model.type='os.system' is not a type of diffengine_sdxl"),
    (('model', 'sampler', 'type'), 'torch.nn.Linear', "model.sampler.type='torch.nn.Linear' is not a type"),
    (('model', 'sampler', 'scheduler', 'type'), 'subprocess.runScheduler', 'model.sampler.scheduler.type'),
    (('model', 'adapters', 'x'), {'type': 'builtins.exec'}, "model.adapters.x.type='builtins.exec'"),
    (('model', 'objective'), {'type': 'stranger.Code'}, "model.objective.type='stranger.Code'"),
    (('custom_imports',), {'imports': ['stranger']}, "must not set 'custom_imports'"),
    (('model', '_scope_'), 'stranger', "must not set 'model._scope_'"),
    (('model', 'cache_dir'), '/tmp', "must not set 'model.cache_dir'"),
    (('train_cfg',), {'type': 'TrainLoop'}, "must not set 'train_cfg'")])
def test_an_untrusted_png(here: Here, place: tuple[str, ...], value: Any, sentence: str) -> None:
    """Its settings are data: only registered types are built, and no module is imported."""
    Path('stranger.py').write_text("open('ran', 'w')\n")
    here.patch.syspath_prepend('.')
    base = str(here.files / 'base')
    config: dict[str, Any] = {'model': {'type': 'SDXL', 'pretrained': base, 'adapters': {},
                                        'sampler': {'type': 'Sampler', 'scheduler': {'type': 'DDIMScheduler'}}}}
    node = config
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    settings = {'request': {'prompt': 'a', 'seed': 0}, 'config': config, 'inputs': [], 'sources': [], 'made': {}}
    write_png(Image.new('RGB', (8, 8)), 's.png', settings)
    here.infer('s.png', code=1)
    assert sentence in here.told and here.told.count('\n') == 0
    assert not Path('ran').exists() and 'stranger' not in sys.modules and not Path('s-again').exists()


def test_adapters_of_the_line(here: Here) -> None:
    """A new LoRA, another file for one of the config (whose other settings stay), an adapter of another kind."""
    whole, bare = here.config('whole.py', adapters=adapters(here.files, 'style', 'depth')), here.config()
    shown, depth, style = here.files / 'outline0.png', here.files / 'depth', here.files / 'style'
    here.infer(bare, '--adapter', f'style={style},scale=0.4',
               f'--adapter=depth={depth},type=T2IAdapter,condition_key=depth',
               '--condition', f'depth={shown}', '--out', 'A')
    expected = by_hand(whole, dict(conditions=dict(depth=str(shown)), scales=dict(style=0.4)))
    assert list(pictures('A').values()) == expected
    other = here.config('other.py', adapters={'style': dict(type='LoRA', weights='none.safetensors', scale=0.4),
                                              **adapters(here.files, 'depth')})
    here.infer(other, '--adapter', f'style={style}', '--condition', f'depth={shown}', '--out', 'B')
    assert list(pictures('B').values()) == expected
    here.infer(bare, '--adapter', f'style={style},scale=0.4', '--out', 'C')
    assert list(pictures('C').values()) != expected


def test_conditions_of_the_line(here: Here) -> None:
    """Several pictures of one adapter, and where it acts; --set goes deeper by dots."""
    config = here.config(adapters=adapters(here.files, 'look', 'style'))
    one, two, mask = (str(here.files / name) for name in ('image1.png', 'image2.png', 'mask.png'))
    here.infer(config, '--condition', f'look={one}', '--condition', f'look={two}', '--out', 'A')
    here.infer(config, '--condition', f'look={one}', '--condition', f'look.mask={mask}', '--out', 'B', '--height', 64,
               '--set', 'scales.style=0.5', 'active_ranges.look=(0,0.5)', 'crops_coords_top_left=(1,2)',
               'vae_slicing=True')
    here.infer(config, '--set', f'conditions.look={one}', 'guidance_rescale=0.5', '--out', 'C')
    expected = by_hand(config, dict(conditions=dict(look=[one, two])), dict(
        conditions=dict(look=dict(image=one, mask=mask)), height=64, scales=dict(style=0.5),
        active_ranges=dict(look=(0, 0.5)), crops_coords_top_left=(1, 2)),
        dict(conditions=dict(look=one), guidance_rescale=0.5))
    assert [next(iter(pictures(folder).values())) for folder in 'ABC'] == expected


def test_weights_of_a_training(here: Here, tiny: dict[str, Any], tmp_path: Path) -> None:
    """A run of two steps: its folder, its checkpoint, its export, none of it; made again; refused once it changed."""
    options = {**tiny, 'train_cfg.max_iters': 2, 'optim_wrapper.optimizer.lr': 0.1}
    train(tmp_path / 'W', options)
    words = ['tiny_t2i_adapter', '--prompt', 'a cat', '--condition', f'adapter={here.files / "outline0.png"}', *SIZE,
             '--cfg-options', f'model.pretrained={here.files / "base"}', 'model.sampler.num_inference_steps=2']
    for i, weights in enumerate(('W', 'W/step2.pth', 'W/step2', 'W/step2/adapter')):
        here.infer(*words, '--weights', weights, '--out', f'P{i}')
        assert pictures(f'P{i}') == pictures('P0')
    here.infer(*words[:3], *words[5:], '--weights', 'none', '--out', 'N')
    base = here.config(sampler=dict(type='Sampler', num_inference_steps=2))
    assert list(pictures('N').values()) == by_hand(base, dict(prompt='a cat')) != list(pictures('P0').values())
    here.infer(*words, '--out', 'X', code=1)
    assert 'does not name the `weights` of adapter; set them' in here.told
    picture, = Path('P1').glob('0*.png')
    here.infer(picture, '--out', 'Q')
    assert pictures('Q') == pictures('P0')
    with open('W/step2.pth', 'ab') as file:
        file.write(b'x')
    here.infer(picture, '--out', 'R', code=1)
    assert "weights ('" in here.told and 'has changed' in here.told and not Path('R').exists()


def bad(here: Here) -> dict[str, tuple[list[Any], str]]:
    """Mistakes, with the sentence for each."""
    here.config('depth.py', adapters=adapters(here.files, 'depth', 'look'))
    here.config('fresh.py', adapters=dict(style=dict(type='LoRA')))
    here.config('dull.py', sampler=None)
    here.config('pndm.py', sampler=dict(type='Sampler', scheduler=dict(type='PNDMScheduler'), num_inference_steps=2))
    other = write_tiny_sdxl(here.files / 'other', hidden=16, cross_attention_dim=32)
    here.config('other.py')
    text = Path('other.py').read_text().replace(str(here.files / 'base'), str(other))
    Path('other.py').write_text(text)
    Path('text.png').write_text('no picture')
    Path('odd.png').write_bytes(b'\x89PNG\r\n\x1a\n' + b'x' * 99)
    Path('rows.toml').write_text('')
    Path('open.csv').write_text('prompt,seed\n"a,1\n')
    Image.new('RGB', (8, 8)).save('grid.png')
    image, style = here.files / 'image0.png', here.files / 'style'
    return {
        'size': (['c.py', '--height', 50], r'Images of 50 x 64 cannot be made: 8 must divide both sides'),
        'none and one': (['c.py', '--weights', 'none', '--adapter', f'style={style}'],
                         '--weights none is the base without adapters; it contradicts --adapter style='),
        'mask': (['c.py', '--mask-image', image], 'needs an `image` to repaint'),
        'strength': (['c.py', '--image', image, '--strength', 0.1], 'strength=0.1 leaves none of 2 steps to do'),
        'no strength': (['c.py', '--image', image, '--strength', 0], 'strength=0.0 must be above 0'),
        'strength alone': (['c.py', '--strength', 0.5], 'strength=0.5 needs an `image`'),
        'no picture': (['depth.py', '--condition', f'look={image}'],
                       "Adapter 'depth' (T2IAdapter) needs an image"),
        'image prompt': (['depth.py', '--condition', f'depth={image}'], "Adapter 'look' (IPAdapter) needs an image"),
        'sigmas': (['pndm.py', '--set', 'sigmas=[9,2]'], 'PNDMScheduler does not take custom sigmas'),
        'timesteps': (['c.py', '--set', 'timesteps=[9,2]', 'sigmas=[2,0]'], 'Give timesteps or sigmas, not both'),
        'wrong base': (['other.py', '--adapter', f'style={style}'], 'style'),
        'no adapter': (['c.py', '--condition', f'depht={image}'], "Unknown adapter 'depht' in `conditions`"),
        'misspelt': (['depth.py', '--condition', f'dept={image}'],
                     "Unknown adapter 'dept' in `conditions`; there are depth, look. Did you mean "
                                                                   "'depth'"),
        'scale': (['c.py', '--set', 'scales.x=1'], "scales: there is no adapter 'x'; there are none"),
        'active_range': (['c.py', '--set', 'active_ranges.x=(0,1)'], "active_ranges: there is no adapter 'x'"),
        'folder': (['c.py', '--image', here.files], f"image: '{here.files}' is a folder; name a file in it"),
        'deep name': (['c.py', '--adapter', f'a.b={style}'], "'a.b' cannot name an adapter"),
        'no scheduler': (['c.py', '--cfg-options', 'model.sampler.scheduler.type=DDIM'],
            "type='DDIM' is not a supported sched"),
        'large seed': (['c.py', '--seed', 10 ** 20], 'is too large; seeds count up from it'),
        'scales': (['c.py', '--set', 'scales=3'], 'scales=3 must be a dict: adapter name -> value'),
        'a folder of prompts': (['c.py', '--prompts', '.'], "'.' is not a prompt file"),
        'an open quote': (['c.py', '--prompts', 'open.csv'], "line 2 of 'open.csv': unexpected end of data"),
        'a grid': (['grid.png'], "'grid.png' holds no settings"),
        'half a letter': (['c.py', '--negative-prompt', 'a\udcff'], "negative_prompt='a\\udcff': character 2 is a"),
        'no base': (['c.py', '--cfg-options', 'model.pretrained=./none'], 'model.pretrained: There is no file'),
        'no file': (['c.py', '--image', 'none.png'], "none.png"), 'text': (['c.py', '--image', 'text.png'], 'text.png'),
        'damaged': (['depth.py', '--condition', 'depth=odd.png', '--condition', f'look={image}'], 'odd.png'),
        'key': (['c.py', '--set', 'guidance_scal=3'], "Unknown setting 'guidance_scal'. Did you mean "
                                                      "'guidance_scale'"),
        'option': (['c.py', '--set', 'vae_tilling=True'], "Did you mean 'vae_tiling'"),
        'option value': (['c.py', '--set', 'vae_tiling=5'], 'infer_cfg.vae_tiling=5 must be True or False'),
        'form': (['c.py', '--set', 'seed'], "--set 'seed' must have the form KEY=VALUE"),
        'brackets': (['c.py', '--set', 'target_size=(1,2'], "--set 'target_size=(1,2': the brackets"),
        'deeper': (['c.py', '--set', 'seed=1', 'seed.x=2'], "--set 'seed.x': 'seed' is 1 already"),
        'infer_cfg': (['c.py', '--cfg-options', 'infer_cfg.sede=1'], "infer_cfg: Unknown setting 'sede'.*'seed'"),
        'seed': (['c.py', '--seed', -1], 'seed=-1 must be at least 0'),
        'number': (['c.py', '--num-images', 0], 'num_images_per_prompt=0 must be at least 1'),
        'batch': (['c.py', '--batch-size', 0], '--batch-size 0 must be at least 1'),
        'steps': (['c.py', '--steps', 0], 'num_inference_steps=0 must be at least 1'),
        'weights': (['c.py', '--weights', 'none.pth'], "There is no checkpoint 'none.pth'"),
        'no weights': (['fresh.py'], 'does not name the `weights` of style'),
        'no sampler': (['dull.py'], 'The config has no `model.sampler`, which makes the images'),
        'refiner': (['c.py', '--set', 'refiner.strength=0.3'], 'the config has no `refiner`'),
        'refiner key': (['c.py', '--set', 'refiner.sede=1'], "Unknown refiner setting 'sede'"),
        'rows': (['c.py', '--prompts', 'none.txt'], "There is no prompt file 'none.txt'"),
        'suffix': (['c.py', '--prompts', 'rows.toml'], "'rows.toml' is not a prompt file"),
        'config': (['d.py'], "There is no config file 'd.py'"), 'png': (['text.png'], "text.png"),
        'foreign png': ([image], 'holds no settings'), 'no png': (['none.png'], 'none.png'),
        'adapter': (['c.py', '--adapter', 'style'], '--adapter takes NAME=SOURCE'),
        'adapter key': (['c.py', '--adapter', f'style={style},scal=1'], "a LoRA has no 'scal'. Did you mean 'scale'"),
        'adapter kind': (['c.py', '--adapter', f'style={style},type=Lora'], "type='Lora' is not a known.*'LoRA'"),
        'adapter file': (['c.py', '--adapter', 'style=./none.safetensors'], 'none.safetensors'),
        'condition': (['c.py', '--condition', '=depth'], '--condition takes ADAPTER=FILE'),
        'reader': (['c.py', '--condition', 'depth'], "--condition 'depth' names no adapter, and no adapter of the"),
        'reads none': (['c.py', '--adapter', f'style={style}', '--condition', f'style={image}'],
                       "Adapter 'style' (LoRA r4) reads no image"),
        'mask for all': (['depth.py', '--condition', f'depth={image}', '--condition', f'depth.mask={image}',
                          '--condition', f'look={image}'], "Adapter 'depth' (T2IAdapter) takes no mask"),
        'prompt_syntax': (['c.py', '--set', 'prompt_syntax=comple'], "prompt_syntax='comple' is unknown"),
        'device': (['c.py', '--device', 'gpu'], "device='gpu' cannot be used here"),
        'shape': (['c.py', '--set', 'latents=n.safetensors'], "latents 'n.safetensors' cannot be read|latents: "),
    }


def test_bad_input(here: Here) -> None:
    """Each is one sentence that names what is wrong, exit code 1, and nothing is written."""
    here.config()
    cases = bad(here)
    faults = []
    for name, (words, sentence) in cases.items():
        there = set(Path().rglob('*'))
        arguments = [*words, '--out', 'P']
        here.capsys.readouterr()
        here.patch.setattr(sys, 'argv', ['infer.py', *map(str, arguments), *(() if '--device' in words else
                                                                             ('--device', 'cpu'))])
        code = here.main()
        err = here.capsys.readouterr().err
        told = [line for line in err.splitlines() if line.startswith('error: ')]
        pattern = sentence if '.*' in sentence or '|' in sentence else re.escape(sentence)
        if code != 1 or len(told) != 1 or not re.search(pattern, told[0]) or 'Traceback' in err or len(told[0]) > 600:
            faults.append((name, code, err[-600:]))
        assert set(Path().rglob('*')) == there, name
    assert not faults, faults
