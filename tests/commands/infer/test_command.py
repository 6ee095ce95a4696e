"""tools/infer.py as a person uses it: rows, pictures that are already present or come again, broken rows, kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import MADE, Here, adapters, by_hand, pictures, stamps
from installs import ROOT
from safetensors.torch import save_file

from diffengine_sdxl import config as configs
from diffengine_sdxl.commands.infer import command
from diffengine_sdxl.commands.infer.untrusted import read_png
from diffengine_sdxl.inference import inferencer
from diffengine_sdxl.inference.inferencer import SDXLInferencer
from diffengine_sdxl.request import Request


def test_prompts_of_the_line(here: Here) -> None:
    """In order, each with its seeds; a page and a grid beside them; without --out under work_dirs; the config's own
    prompt if none is given."""
    here.config()
    here.infer('c.py', '--prompt', 'a cat', 'A dog: <b>!', '--num-images', 2, '--seed', 5, '--guidance-scale', 3)
    folder = Path('work_dirs/c/images')
    names = ['00000-seed5-a-cat.png', '00001-seed6-a-cat.png', '00002-seed5-a-dog-b.png', '00003-seed6-a-dog-b.png']
    assert list(pictures(folder)) == names and "4 made: see 'work_dirs/c/images/index.html'." in here.said
    assert {p.name for p in folder.iterdir()} == {*names, *MADE}
    said = dict(guidance_scale=3.0, seed=5, num_images_per_prompt=2)
    assert list(pictures(folder).values()) == by_hand(Path('c.py'), dict(prompt='a cat', **said),
                                                      dict(prompt='A dog: <b>!', **said))
    here.infer('c.py', '--out', 'P')
    assert list(pictures('P')) == ['00000-seed0-a-frog.png']
    assert list(pictures('P').values()) == by_hand(Path('c.py'), {})


ROWS = [dict(prompt='a cat', seed=3), dict(prompt='a dog', prompt_2='two', image='image1.png', strength=0.9),
        dict(prompt='a hen', height=64, num_inference_steps=3, scales={'style': 0.3}, crops_coords_top_left=[3, 4])]
TABLE = """prompt,seed,prompt_2,image,strength,height,num_inference_steps,scales.style,crops_coords_top_left
a cat,3,,,,,,,
a dog,,two,image1.png,0.9,,,,
a hen,,,,,64,3,0.3,"3,4"
"""


def test_prompts_of_a_file(here: Here) -> None:
    """Rows with settings of their own, as a table or as JSON; what the command line says holds for all."""
    config = here.config(adapters=adapters(here.files, 'style'))
    shutil.copy(here.files / 'image1.png', '.')
    Path('rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
    Path('rows.csv').write_text(TABLE)
    Path('rows.txt').write_text('# cats\na cat\n\na dog\n')
    for kind in ('jsonl', 'csv', 'txt'):
        here.infer(config, '--prompts', f'rows.{kind}', '--negative-prompt', 'blurry', '--out', kind)
    expected = by_hand(config, *[dict(row, negative_prompt='blurry') for row in ROWS])
    assert list(pictures('jsonl').values()) == expected and pictures('csv') == pictures('jsonl')
    assert list(pictures('txt')) == ['00000-seed0-a-cat.png', '00001-seed0-a-dog.png']
    here.infer(config, '--prompts', 'rows.csv', '--negative-prompt', 'blurry', '--out', 'together', '--batch-size', 2)
    for got, alone in zip(pictures('together').values(), expected, strict=True):
        assert np.abs(np.frombuffer(got, np.uint8).astype(int) - np.frombuffer(alone, np.uint8)).max() <= 1


@pytest.mark.parametrize('batch_size', [1, 3])
def test_a_broken_row_stops_no_other(here: Here, batch_size: int) -> None:
    """Told by its line; what can only be found out while making too; and when it is mended, the others stay."""
    config = here.config()
    Path('cut.png').write_bytes((here.files / 'image0.png').read_bytes()[:200])
    good = [json.dumps(dict(prompt='a cat', guidance_scale=g)) for g in (3, 5, 7)]
    bad = ['{"prompt": "a', '{"prompt": "x", "sede": 1}', '{"image": "none.png"}', '{"image": "cut.png"}',
           '{"height": 50}', '{"image": "cut.png", "strength": 0.01}']
    Path('rows.jsonl').write_text('\n'.join([good[0], *bad, *good[1:]]))
    words = [config, '--prompts', 'rows.jsonl', '--out', 'P', '--batch-size', batch_size]
    here.infer(*words, code=1)
    lines = here.told.splitlines()
    for number, sentence in ((2, 'not JSON'), (3, "Unknown setting 'sede'. Did you mean 'seed'"),
                             (4, "image='none.png': there is no file"), (5, "cut.png') is not a readable image"),
                             (6, '50 x 64 cannot be made: 8 must divide both sides'), (7, 'cut.png')):
        assert sum(sentence in line and f'line {number}' in line for line in lines) == 1, (number, here.told)
    assert len(lines) == 6 and len(pictures('P')) == 3
    before = stamps('P')
    Path('rows.jsonl').write_text('\n'.join([good[0], *[json.dumps(dict(prompt='a cat', guidance_scale=2))] * 1,
                                             *bad[1:], *good[1:]]))
    here.infer(*words, code=1)
    assert '1 made, 3 already present' in here.said and len(pictures('P')) == 4
    assert {name: stamp for name, stamp in stamps('P').items() if name in before} == before


def test_one_that_fails_takes_none_of_its_batch_along(here: Here) -> None:
    """Latents that overflow are found out in the sampler, among others of the same size and kind."""
    config, image = here.config(), here.files / 'image0.png'
    shutil.copy(image, 'i.png')
    Path('rows.jsonl').write_text('\n'.join(json.dumps(dict(prompt=p, image='i.png', latents=f'{p}.safetensors'))
                                            for p in 'abc'))
    for p in 'abc':
        save_file({'x': torch.full((4, 6, 8), 3e38 if p == 'b' else 0.5)}, f'{p}.safetensors')
    here.infer(config, '--prompts', 'rows.jsonl', '--out', 'P', '--strength', 0.9, '--batch-size', 3, code=1)
    assert list(pictures('P')) == ['00000-seed0-a.png', '00002-seed0-c.png']
    assert 'line 2' in here.told and 'not finite from step 1 of' in here.told and here.told.count('error: ') == 1


def test_what_is_done_is_done(here: Here) -> None:
    """Nothing is made twice, nor is the model built; new prompts are made; other settings are refused, with the key."""
    config = here.config()
    words = [config, '--prompt', 'a cat', '--num-images', 2, '--out', 'P']
    here.infer(*words)
    before = stamps('P')
    shutil.move(here.files / 'base' / 'unet', here.files / 'unet')
    try:
        # The base's SHA-256 is part of the settings, so it cannot be gone; its weights are not read, though.
        here.infer(*words, code=1)
        assert 'other settings' in here.told
    finally:
        shutil.move(here.files / 'unet', here.files / 'base' / 'unet')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SDXLInferencer, '__init__', None)
        here.infer(*words)
    assert '0 made, 2 already present' in here.said and stamps('P') == before
    here.infer(*words, '--num-images', 3)
    assert '1 made, 2 already present' in here.said and {**stamps('P'), **before} == stamps('P')
    here.infer(*words, '--guidance-scale', 2, code=1)
    assert "'P/00000-seed0-a-cat.png' was made with other settings: " in here.told and 'guidance_scale' in here.told
    assert {**stamps('P'), **before} == stamps('P')


def test_killed_in_the_middle(here: Here) -> None:
    """`kill -9` leaves whole pictures, and the same command makes the rest of them, as if nothing had happened."""
    config = here.config()
    words = [str(config), '--num-images', '12', '--out', 'P', '--device', 'cpu']
    process = subprocess.Popen([sys.executable, str(ROOT / 'tools' / 'infer.py'), *words, '--steps', '4'],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    end = time.monotonic() + 120
    while len(list(Path('P').glob('*.png'))) < 2 and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = stamps('P')
    assert 2 <= len(before) < 12 and all(read_png(Path('P') / name) for name in before)
    here.infer(*words[:-2], '--steps', 4)
    assert f'{12 - len(before)} made, {len(before)} already present' in here.said
    after = stamps('P')
    assert {name: after[name] for name in before} == before
    assert {p.name for p in Path('P').iterdir()} == {*after, *MADE}, 'nothing half-written is left'
    assert list(pictures('P').values()) == by_hand(config, dict(num_images_per_prompt=12, num_inference_steps=4))


def test_a_foreign_folder_is_left_alone(here: Here) -> None:
    """A page, a grid or an image of another origin is not overwritten; nor is a file taken for a folder."""
    config = here.config()
    for name, sentence in (('index.html', 'was not written by diffengine_sdxl'), ('grid.png', 'was not written by'),
                           ('00000-seed0-a-frog.png', 'holds no settings')):
        folder = Path(name.split('.')[0])
        folder.mkdir()
        if name.endswith('png'):
            shutil.copy(here.files / 'image0.png', folder / name)
        else:
            (folder / name).write_text('mine')
        before = (folder / name).read_bytes()
        here.infer(config, '--out', folder, code=1)
        assert name in here.told and sentence in here.told
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {name: before}
    here.infer(config, '--out', config, code=1)
    assert "'c.py' is a file; choose another --out" in here.told


@pytest.fixture
def everything(here: Here, tmp_path: Path) -> Iterator[tuple[Here, Path]]:
    """An image with all kinds of inputs, copied for the test."""
    own = tmp_path / 'own'
    shutil.copytree(here.files, own, ignore=shutil.ignore_patterns('base'))
    # By paths that hold from here only.
    here.config('all.py', adapters=adapters(Path('own'), 'depth', 'look'))
    here.infer('all.py', '--image', 'own/image0.png', '--mask-image', 'own/mask.png', '--strength', 0.9, '--seed', 4,
               '--condition', 'depth=own/outline0.png', '--condition', 'look=own/image1.png', '--adapter',
               'style=own/style,scale=0.7', '--set', 'scales.depth=0.5', '--out', 'P')
    yield here, Path('P') / '00000-seed4-a-frog.png'


def test_made_again_from_itself(everything: tuple[Here, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise, from another folder, where its paths would lead elsewhere; and the copy again from itself."""
    here, picture = everything
    picture, expected = picture.resolve(), list(pictures('P').values())
    Path('elsewhere').mkdir()
    monkeypatch.chdir('elsewhere')
    here.infer(picture)
    again = picture.with_name(f'{picture.stem}-again')
    assert list(pictures(again).values()) == expected
    here.infer(next(again.glob('0*.png')), '--out', 'Q')
    assert list(pictures('Q').values()) == expected
    here.infer(picture)
    assert '0 made, 1 already present' in here.said
    assert read_png(again / picture.name)['request'] == read_png(picture)['request']


def test_other_inputs_are_refused_by_name(everything: tuple[Here, Path]) -> None:
    """Each that has changed or is gone: an image, mask, condition, LoRA or encoder; and other options."""
    here, picture = everything
    for name, key in (('image0.png', 'image'), ('mask.png', 'mask_image'), ('outline0.png', 'conditions.depth'),
                      ('image1.png', 'conditions.look'),
                      ('style/pytorch_lora_weights.safetensors', 'model.adapters.style.weights'),
                      ('image_encoder/model.safetensors', 'model.adapters.look.image_encoder')):
        path = Path('own') / name
        assert path.is_file(), sorted(p.name for p in path.parent.iterdir())
        held = path.read_bytes()
        path.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
        here.infer(picture, '--out', 'Q', code=1)
        assert f"The image cannot be made again: {key} ('" in here.told and 'has changed (SHA-256' in here.told
        path.unlink()
        here.infer(picture, '--out', 'Q', code=1)
        assert here.told.count(';') == 0 and f'{key} (' in here.told
        path.write_bytes(held)
    here.infer(picture, '--seed', 3, '--prompt', 'x', '--out', 'Q', code=1)
    assert 'is made again by its own settings, so prompt, seed cannot be changed' in here.told
    assert not Path('Q').exists()


def test_a_config_is_checked_once(here: Here) -> None:
    """With three prompts: one check, one resolve, one build of the defaults and one of each request."""
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        here.patch.setattr(owner, name, lambda *args, **kwargs: (calls.update([name]), real(*args, **kwargs))[1])
    config = here.config()
    loader = sys.modules['diffengine_sdxl.config.load']  # the package's `load` is the function
    for module in (command, inferencer, loader):
        count(module, 'check')
    for module in (configs, loader):
        count(module, 'resolve')
    count(Request, 'of')
    here.infer(config, '--prompt', 'a cat', 'a dog', 'a hen', '--num-images', 2, '--out', 'P')
    assert len(pictures('P')) == 6 and calls == dict(check=1, resolve=1, of=4)
