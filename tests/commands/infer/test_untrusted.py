"""PNGs from others: whatever their settings, a UserError comes before anything is loaded or fetched."""

import copy
import json
import random
import socket
import struct
import time
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from asking import Here, pictures
from commands.infer.test_digests import A, B, cached
from PIL import Image

from diffengine_sdxl.commands.infer import command as tool
from diffengine_sdxl.commands.infer import provenance, untrusted
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.inference.inferencer import SDXLInferencer
from diffengine_sdxl.request import SETTINGS, Request

SIDE = 8


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def write(path: Path, settings: Any) -> Path:
    """Write a PNG with `settings`; return its path."""
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', SIDE, SIDE, 8, 2, 0, 0, 0))
    text = chunk(b'iTXt', b'diffengine_sdxl\0\0\0\0\0' + json.dumps(settings).encode())
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + head + text + chunk(b'IDAT', b'') + chunk(b'IEND', b''))
    return path


def again(path: Path) -> tool.Plan:
    """Return the command's plan for a PNG, as far as to where the models load."""
    keys = ('prompt', 'prompts', 'condition', 'adapter', 'set', 'weights', 'cfg_options', *SETTINGS)
    plan = tool._plan_from_png(Namespace(config=str(path), **dict.fromkeys(keys)))
    for one in plan.jobs():
        provenance.record(one.request, plan.config, plan.weights)
    return plan


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    """The settings of an image with all kinds of parts."""
    (tmp_path / 'base').mkdir()
    for name in ('base/x', 'style.safetensors'):
        (tmp_path / name).write_text(name)
    for name in 'ab':
        Image.new('RGB', (SIDE, SIDE)).save(tmp_path / f'{name}.png')
    config = {
        'model': dict(type='SDXL', pretrained=str(tmp_path / 'base'), vae='org/vae', revision='v1', adapters=dict(
            style=dict(type='LoRA', weights=str(tmp_path / 'style.safetensors'), scale=0.5),
            depth=dict(type='T2IAdapter', weights='org/depth', condition_key='depth')), sampler=dict(
            type='Sampler', num_inference_steps=30, scheduler=dict(type='DDIMScheduler', beta_end=0.01),
            guidances=[dict(type='CFG', scale=6.5), dict(type='SAG', scale=0.5, active_range=[0, 0.5])])),
        'refiner': dict(type='SDXL', pretrained='org/refiner', shared_components=['vae']),
        'infer_cfg': dict(vae_tiling=True),
        'randomness': dict(seed=3)}
    request = Request.of(dict(
        prompt='p', seed=4, image=str(tmp_path / 'a.png'), strength=0.5, original_size=(8, 16), height=SIDE,
        width=SIDE, timesteps=[9, 3], guidance_scale=5, scales={'style': 0.3}, active_ranges={'style': [0, 0.5]},
        refiner={'strength': 0.2}, conditions={'depth': {'image': str(tmp_path / 'b.png'), 'mask': 'https://x.org/m.png'}}))
    return json.loads(json.dumps(provenance.record(request, config, None, {'seconds': 1})))


def nested(part: Any, depth: int) -> Any:
    for _ in range(depth):
        part = [part] if isinstance(part, list) else {'a': part}
    return part


VALUES: list[Any] = [
    None, True, 0, -1, 3, 10**400, 10**12, 1e308, float('nan'), float('inf'), '', 'x', 'a.b.c', '../..', '/dev/zero',
    '/', '\ud800', '\0', 'x' * 5000, '{{fileDirname}}', '{{x:y}}', '$HOME', [], [1], [[]], [None], {}, {'': 1},
    {'a': 1}, {'type': 'LoRA'}, {'type': 'X'}, {'type': None}, {'_delete_': True}, {'a.b': {'c': 1}},
    {'keys': 1, 'get': 3}, nested([], 400), nested({}, 400), A]


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    parts = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [*([path] if path else []), *(place for key, value in parts for place in places(value, (*path, key)))]


def mutated(settings: Any, where: list[tuple[Any, ...]], rng: random.Random) -> Any:
    """Return a copy with one or two places removed, replaced, or given another key."""
    found = copy.deepcopy(settings)
    for _ in range(rng.choice([1, 1, 1, 2])):
        *path, last = rng.choice(where)
        node = found
        try:
            for key in path:
                node = node[key]
            what = rng.random()
            if what < 0.1:
                del node[last]
            else:
                node[last if what > 0.2 else rng.choice(['type', 'keys', '_scope_', 'commit', ''])] = rng.choice(VALUES)
        except (TypeError, KeyError, IndexError):  # the first change took the second one's place away
            pass
    return found


def test_random_changes(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of hundreds is accepted, or refused by a UserError of limited length, quickly and without network."""
    monkeypatch.setattr(socket, 'socket', None)
    assert again(write(tmp_path / 'm.png', settings)).rows[0][2].seed == 4
    rng, where, refused = random.Random(0), places(settings), 0
    began = time.monotonic()
    for number in range(700):
        path = write(tmp_path / 'm.png', mutated(settings, where, rng))
        try:
            again(path)
        except UserError as error:
            refused += 1
            assert 8 < len(str(error)) < 1100, (number, str(error))
    assert 300 < refused < 690 and time.monotonic() - began < 60


@pytest.mark.parametrize(('place', 'value', 'words'), [
    (('request', 'height'), 100_000, '8 x 8 pixels, and its settings ask for 100000 x 8'),
    (('request', 'width'), 64, 'ask for 8 x 64'),
    (('request', 'num_inference_steps'), 10**9, "'request.num_inference_steps' asks for 1000000000"),
    (('request', 'timesteps'), [1] * 10_001, "'request.timesteps' has 10001 entries"),
    (('config', 'model', 'sampler', 'num_inference_steps'), 10_001, 'num_inference_steps'),
    (('config', 'model', 'sampler', 'scheduler', 'num_train_timesteps'), 1e12, 'num_train_timesteps'),
    (('config', 'model', 'adapters', 'style', 'rank'), float('nan'), 'rank'),
    (('config', 'model', 'adapters', 'style', 'any'), [1, 4097], "'config.model.adapters.style.any.1' asks for 4097"),
    (('config', 'model', 'sampler', 'scheduler', 'solver_order'), 10**9, "solver_order' asks for 1000000000"),
    (('request', 'num_images_per_prompt'), 10**8, "num_images_per_prompt' asks for 100000000"),
    (('request', 'conditions', 'depth'), ['https://x.org/a.png'] * 257, "conditions.depth' has 257 entries"),
    (('request', 'prompt'), 'a ' * 10_001, "'request.prompt' has 20002 characters"),
    (('request', 'refiner'), {'negative_prompt': 'a' * 20_001},
     "'request.refiner.negative_prompt' has 20001 characters"),
    (('config', 'model', 'sampler', 'guidances'), [dict(type='SAG')] * 33, "guidances' has 33 entries"),
    (('config', 'model', 'adapters'), {f'a{i}': dict(type='LoRA') for i in range(33)}, "adapters' has 33 entries"),
    (('request',), dict(prompt='p', height=80_000, width=80_000, image='https://x.org/a.png', padding_mask_crop=4,
                        mask_image='https://x.org/m.png'),
     "asks for 80000 x 80000 pixels; a PNG may ask for at most 67108864"),
    (('request', 'seed'), 10**400, "'request.seed' is a number of 1329 bits"),
    (('config', 'model', 'x'), nested([], 400), 'is nested more than 32 deep'),
    (('sources', 1, 'commit'), '../../etc', "'sources.1.commit' is not a commit"),
    (('sources', 1, 'revision'), 3, 'revision')])
def test_limits(settings: Any, tmp_path: Path, place: tuple[Any, ...], value: Any, words: str) -> None:
    node = settings
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    with pytest.raises(UserError) as caught:
        again(write(tmp_path / 'm.png', settings))
    assert words in str(caught.value) and 'm.png' in str(caught.value)


def test_settings_that_fail_to_build(here: Here) -> None:
    """A value that no check knows, deep in a scheduler, is a sentence without a traceback."""
    here.infer(here.config(), '--out', 'P')
    path, = Path('P').glob('0*.png')
    found = untrusted.read_png(path)
    found['config']['model']['sampler']['scheduler']['trained_betas'] = {'a': 1}
    with Image.open(path) as image:
        provenance.write_png(image, 's.png', found)
    here.infer('s.png', '--out', 'Q', code=1)
    assert 'trained_betas must be a list of 1000 numbers' in here.told and not Path('Q').exists()


def test_hub_commits_are_pinned(here: Here) -> None:
    """The PNG records the commit, and is made again from it after the branch has moved."""
    from huggingface_hub import constants
    here.patch.setattr(constants, 'HF_HUB_CACHE', str(here.files.parent / here.files.name / 'hub'))
    hub = Path(constants.HF_HUB_CACHE)
    own = cached(hub, 'org/base', main=A)
    base = own / 'snapshots' / A
    base.rmdir()
    base.symlink_to(here.files / 'base')
    here.patch.setenv('HF_HUB_OFFLINE', '1')
    here.patch.setattr(constants, 'HF_HUB_OFFLINE', True)
    here.config()
    Path('hub.py').write_text(Path('c.py').read_text().replace(str(here.files / 'base'), 'org/base'))
    here.infer('hub.py', '--out', 'P')
    path, = Path('P').glob('0*.png')
    assert untrusted.read_png(path)['sources'] == [
        {'key': 'model.pretrained', 'path': 'org/base', 'sha256': None, 'revision': None, 'commit': A}]
    here.infer('hub.py', '--out', 'P')
    assert '1 already present' in here.said and f'commit {A[:16]}' in Path('P/index.html').read_text()
    cached(hub, 'org/base', main=B)
    here.infer(path, '--out', 'Q')
    assert (f"model.pretrained: 'org/base' has moved on the hub, to {B[:12]}; using {A[:12]}, as the image did."
            ) in here.said
    assert pictures('Q').values() != {} and list(pictures('Q').values()) == list(pictures('P').values())
    other, = Path('Q').glob('0*.png')
    assert untrusted.read_png(other)['sources'][0]['commit'] == A
    # Its recorded config is the first one's, without the commit: the first image counts as present, and is pinned.
    here.infer(path, '--out', 'P')
    assert '1 already present' in here.said
    here.infer(other, '--out', 'R')
    assert list(pictures('R').values()) == list(pictures('P').values())


def test_what_cannot_be_pinned_is_refused(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE takes no revision, so it is refused once it has moved; a missing cache is accepted."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    for repo in ('org/vae', 'org/depth', 'org/refiner'):
        cached(tmp_path / 'hub', repo, main=A)
    told = provenance.add_commits(settings, settings['config'])
    assert {e['key']: e['commit'] for e in told['sources'] if 'commit' in e} == dict.fromkeys(
        ('model.vae', 'model.adapters.depth.weights', 'refiner.pretrained'), A)
    plan = again(write(tmp_path / 'm.png', told))
    revisions = [part.revision for part in (plan.config.model.adapters.depth, plan.config.refiner, plan.config.model)]
    assert revisions == [A, A, 'v1']
    cached(tmp_path / 'hub', 'org/vae', main=B)
    with pytest.raises(UserError, match=rf"model.vae \('org/vae'\) has moved on .*commit {B[:12]}, was {A[:12]}"):
        again(write(tmp_path / 'm.png', told))
    # With a network it may move during loading.
    cached(tmp_path / 'hub', 'org/vae', main=A)
    plan = again(write(tmp_path / 'm.png', told))

    def load(self: Any, *_: Any, **__: Any) -> None:
        cached(tmp_path / 'hub', 'org/vae', main=B)
    monkeypatch.setattr(SDXLInferencer, '__init__', load)
    with pytest.raises(UserError, match='model.vae .* has moved'):
        tool._load(plan, 'cpu')


@pytest.mark.parametrize('key', ['model.pretrained', 'refiner.pretrained', 'model.adapters.depth.weights'])
def test_nothing_is_built_without_weights(settings: Any, tmp_path: Path, key: str) -> None:
    """SDXL of random weights would take 14 GB, whoever sends the PNG."""
    *path, last = key.split('.')
    node = settings['config']
    for name in path:
        node = node[name]
    node[last] = None
    with pytest.raises(UserError, match=f'sets no {key}, and random weights'):
        again(write(tmp_path / 'm.png', settings))
