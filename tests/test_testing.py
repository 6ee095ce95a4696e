"""`python -m diffengine_sdxl.testing`: the commands that it prints work, and it makes images of configs offline."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffengine_sdxl import config
from diffengine_sdxl.commands import cli
from diffengine_sdxl.testing.__main__ import ADAPTERS, FILE, main
from diffengine_sdxl.testing.adapters import write_tiny_adapter
from diffengine_sdxl.testing.stand_ins import StandIns, make_image

FILL50K = 'stable_diffusion_xl_t2i_adapter_fill50k'


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


def test_the_printed_commands_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each makes an image of its own, so no adapter is idle; the one that trains is parsed, and its config loads."""
    folder = tmp_path / 'tiny models'
    assert main([str(folder), '--num-images', '2']) == 0
    assert {p.name for p in folder.iterdir()} == {'base', 'refiner', 'image_encoder', 'data', FILE,
                                                 *ADAPTERS}
    assert len([*(folder / 'data' / 'images').iterdir()]) == 2
    printed = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in printed if line.startswith('diffengine-sdxl')]
    images = []
    for words in commands:
        if words[1] == 'train':
            args = cli.parse('train', words[2:])
            assert config.load(args.config, args.cfg_options).model.pretrained == str(folder / 'base')
            continue
        assert words[1] == 'infer' and cli.main('infer', [*words[2:], '--num-inference-steps', '2']) == 0, words
        made, = Path(words[words.index('--out') + 1]).glob('00000-*.png')
        images.append(pixels(made))
    assert len(images) == len(ADAPTERS) + 4
    assert not [(i, k) for k, other in enumerate(images) for i in range(k) if np.array_equal(images[i], other)]


def test_the_same_bytes_each_time(tiny_base: Path, tmp_path: Path) -> None:
    files = [write_tiny_adapter(tmp_path / name, tiny_base, ADAPTERS['t2i_adapter'])
             / 'diffusion_pytorch_model.safetensors' for name in 'ab']
    assert files[0].read_bytes() == files[1].read_bytes()


def test_run_makes_images_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a config that infers and of one that trains, without its data; one that cannot does not stop the others."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')  # `main` sets it; undo that afterwards
    assert main(['run', 'shapes_vae', 'sdxl_t2i_adapter', FILL50K, '--out', str(tmp_path / 'P')]) == 1
    printed = capsys.readouterr()
    assert '2 of 3 made images.' in printed.out
    assert 'error: shapes_vae: The config has no `model.sampler`' in printed.err
    assert {p.name for p in (tmp_path / 'P').iterdir()} == {'sdxl_t2i_adapter.png', f'{FILL50K}.png'}
    assert all(pixels(p).shape == (64, 64, 3) for p in (tmp_path / 'P').iterdir())


OWN = """
_base_ = ['diffengine_sdxl::infer/sdxl_inpainting.py']
refiner = dict(type='SDXL', pretrained='me/my-refiner', vae='me/vae', revision='v2')
model = dict(
    pretrained='https://huggingface.co/me/base/blob/main/base.safetensors?download=true', tokenizer='me/tokenizer',
    variant='fp16',
    adapters=dict(
        edges=dict(type='ControlNet', weights='me/controlnet', subfolder='edges', trainable=False, scale=0.5),
        faces=dict(type='IPAdapter', weights='me/ip', weight_name='x.safetensors', condition_key='faces',
                   image_encoder='me/clip', trainable=False, scale=0.9),
        thing=dict(type='TextualInversion', token='<thing>', weights='me/thing', trainable=False)))
infer_cfg = dict(
    prompt='a <thing>', padding_mask_crop=8, refiner=dict(num_inference_steps=30, strength=0.5),
    conditions=dict(edges='https://a.b/edges.png', faces=dict(image=['a.jpg', 'b.jpg'], mask=['m.png', 'n.png'])))
"""


def sources(value: Any) -> Iterator[str]:
    """Yield all texts in a config that look like an id, a link or a file."""
    if isinstance(value, dict):
        for part in value.values():
            yield from sources(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from sources(part)
    elif isinstance(value, str) and ('/' in value or '.' in value):
        yield value


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    """Whatever may name an id, a link or an image is replaced, and what it says of scales and the like stays."""
    path = tmp_path / 'own.py'
    path.write_text(OWN)
    stand_ins = StandIns(tmp_path / 'stand ins')
    changed = config.load(path, stand_ins.overrides(config.resolve(config.load(path))))
    plain = config.resolve(changed).to_dict()
    used = {key: plain[key] for key in ('model', 'refiner', 'infer_cfg')}
    assert [text for text in sources(used) if not Path(text).exists()] == []
    model, own = plain['model'], plain['infer_cfg']
    assert model['pretrained'].endswith('.safetensors') and model['variant'] is None
    assert [a['scale'] for a in model['adapters'].values() if 'scale' in a] == [0.5, 0.9]
    assert own['refiner'] == dict(num_inference_steps=6, strength=0.5)
    assert (own['height'], own['padding_mask_crop']) == (64, 8)
    assert len(set(own['conditions']['faces']['image'])) == 2
    assert make_image(path, stand_ins).size == (64, 64)
