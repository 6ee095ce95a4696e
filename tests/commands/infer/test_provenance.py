"""Settings in a PNG: read as written, by other tools too; changed files are named; untrusted settings run nothing."""

import hashlib
import json
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffengine_sdxl.commands.infer import provenance as p
from diffengine_sdxl.commands.infer import untrusted as u
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.request import Request

#: Hexadecimal digits of a digest in an error.
SHORT = 12


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images, and bytes in place of weights, which are not loaded here."""
    (tmp_path / 'base' / 'unet').mkdir(parents=True)
    for name in ('base/model_index.json', 'base/unet/w.safetensors', 'base/z.txt', 'style.safetensors',
                 'step2.pth', 'z.safetensors'):
        (tmp_path / name).write_bytes(name.encode() * 3)
    for i, name in enumerate(('a.png', 'b.png', 'c.png')):
        Image.new('RGB', (4, 4), (i, 0, 0)).save(tmp_path / name)
    return tmp_path


def config_of(folder: Path) -> dict[str, Any]:
    return {
        'model': dict(type='SDXL', pretrained=str(folder / 'base'), vae='org/vae', revision='v1',
                      cache_dir='/somewhere', objective=dict(type='Denoise'), adapters=dict(
                          style=dict(type='LoRA', weights=str(folder / 'style.safetensors'), scale=0.5),
                          depth=dict(type='T2IAdapter', weights='org/depth', revision='main'),
                          part=dict(type='LoRA', weights=str(folder), weight_name='z.safetensors'), gone=None),
                      sampler=dict(type='Sampler', num_inference_steps=30, guidances=[dict(type='CFG', scale=6.5)],
                                   scheduler=dict(type='DDIMScheduler'))),
        'refiner': dict(type='SDXL', pretrained=str(folder / 'base' / 'unet' / 'w.safetensors')),
        'infer_cfg': dict(vae_tiling=True, prompt='a default'), 'randomness': dict(seed=3),
        'default_hooks': dict(a=1)}


def request_of(folder: Path, **more: Any) -> Request:
    return Request.of({'prompt': 'ä castle\n"x"', 'seed': 42, 'image': str(folder / 'a.png'), 'original_size': (8, 16),
                       'guidance_scale': 5, 'conditions': {'depth': [str(folder / 'b.png'), str(folder / 'c.png')],
                                                           'face': {'image': str(folder / 'a.png'),
                                                                    'mask': 'https://x.org/m.png'}}}, more)


def written(folder: Path, **more: Any) -> tuple[Path, dict[str, Any]]:
    settings = p.record(request_of(folder, **more), config_of(folder), str(folder / 'step2.pth'), {'seconds': 1.5})
    p.write_png(Image.new('RGB', (16, 8), (1, 2, 3)), folder / 'out.png', settings)
    return folder / 'out.png', settings


def test_settings_are_read_as_written(folder: Path) -> None:
    """By PIL too, with the pixels."""
    path, settings = written(folder, scales={'style': 0.25}, timesteps=(999, 1), height=8)
    read = u.read_png(path)
    assert read == json.loads(json.dumps(settings)) and read['format'] == 1 and read['made'] == {'seconds': 1.5}
    request = request_of(folder, scales={'style': 0.25}, timesteps=(999, 1), height=8)
    assert Request.of(read['request']) == request
    assert read['weights'] == str(folder / 'step2.pth')
    assert read['config'].keys() == {'model', 'refiner', 'infer_cfg', 'randomness'}
    assert not {'cache_dir', 'objective'} & read['config']['model'].keys()
    assert read['config']['infer_cfg'] == {'vae_tiling': True}
    with Image.open(path) as image:
        assert json.loads(image.text['diffengine_sdxl']) == read and image.size == (16, 8)  # type: ignore[attr-defined]
        assert image.getpixel((3, 3)) == (1, 2, 3)
        # As AUTOMATIC1111 writes it: last line the settings, before it the prompts.
        assert image.text['parameters'] == (  # type: ignore[attr-defined]
            'ä castle\n"x"\nSteps: 30, Sampler: DDIMScheduler, CFG scale: 5.0, Seed: 42, Size: 16x8, Model: base, '
            'Version: diffengine_sdxl')
    assert not list(folder.glob('.*'))


def test_effective_settings_come_from_the_config(folder: Path) -> None:
    settings = p.record(Request.of({'prompt': 'p', 'negative_prompt': 'n, m'}), config_of(folder))
    keys = ('guidance_scale', 'num_inference_steps', 'strength')
    assert [p.effective(settings, key) for key in keys] == [6.5, 30, None]
    assert p.parameters(settings, (1, 2)).startswith('p\nNegative prompt: n, m\nSteps: 30, ')


def test_any_text_is_kept(folder: Path) -> None:
    """Lone surrogates, which a command line with invalid bytes holds, and control characters."""
    text = 'a\udcff\x00 東京 <script> "\\n' + chr(0x1F600)
    settings = p.record(Request.of({'prompt': text}), config_of(folder))
    p.write_png(Image.new('RGB', (2, 2)), folder / 'out.png', settings)
    assert u.read_png(folder / 'out.png')['request']['prompt'] == text


def test_files_by_path_and_digest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As hashlib has them; paths become absolute."""
    monkeypatch.chdir(folder)
    request = request_of(folder, image='a.png', latents='z.safetensors')
    assert sorted(p.inputs(request), key=str) == [
        {'key': 'conditions.depth.0', 'path': str(folder / 'b.png'), 'sha256': sha(folder / 'b.png')},
        {'key': 'conditions.depth.1', 'path': str(folder / 'c.png'), 'sha256': sha(folder / 'c.png')},
        {'key': 'conditions.face.image', 'path': str(folder / 'a.png'), 'sha256': sha(folder / 'a.png')},
        {'key': 'conditions.face.mask', 'path': 'https://x.org/m.png', 'sha256': None},
        {'key': 'image', 'path': str(folder / 'a.png'), 'sha256': sha(folder / 'a.png')},
        {'key': 'latents', 'path': str(folder / 'z.safetensors'), 'sha256': sha(folder / 'z.safetensors')}]
    lines = [f'{name}\0{sha(folder / "base" / name)}\n' for name in ('model_index.json', 'unet/w.safetensors', 'z.txt')]
    base = hashlib.sha256(''.join(lines).encode()).hexdigest()
    config = {**config_of(folder), 'model': {**config_of(folder)['model'], 'pretrained': 'base'}}
    assert p.sources(config, str(folder / 'step2.pth')) == [
        {'key': 'model.pretrained', 'path': str(folder / 'base'), 'sha256': base},
        {'key': 'model.vae', 'path': 'org/vae', 'sha256': None, 'revision': None},
        {'key': 'model.adapters.style.weights', 'path': str(folder / 'style.safetensors'),
         'sha256': sha(folder / 'style.safetensors')},
        {'key': 'model.adapters.depth.weights', 'path': 'org/depth', 'sha256': None, 'revision': 'main'},
        {'key': 'model.adapters.part.weights', 'path': str(folder / 'z.safetensors'),
         'sha256': sha(folder / 'z.safetensors')},
        {'key': 'refiner.pretrained', 'path': str(folder / 'base/unet/w.safetensors'),
         'sha256': sha(folder / 'base/unet/w.safetensors')},
        {'key': 'weights', 'path': str(folder / 'step2.pth'), 'sha256': sha(folder / 'step2.pth')}]
    settings = p.record(request, config)
    assert settings['config']['model']['pretrained'] == str(folder / 'base')
    assert settings['request']['image'] == str(folder / 'a.png')
    assert p.record(request, config, 'none')['weights'] == 'none'
    assert 'weights' not in p.record(request, config, 'weights')
    assert config['model']['pretrained'] == 'base'
    shapes = p.sources({'model': {'pretrained': 'diffengine_sdxl::shapes/base'}})[0]
    assert shapes['path'] == 'diffengine_sdxl::shapes/base' and shapes['sha256']


def test_missing_files_are_named_by_key(folder: Path) -> None:
    with pytest.raises(UserError, match="conditions.depth: There is no file '.*none.png'"):
        p.inputs(Request.of({'conditions': {'depth': str(folder / 'none.png')}}))
    with pytest.raises(UserError, match="model.vae: There is no file '.*none'"):
        p.sources({'model': {'vae': './none'}})
    for device in ('/dev/null', '/dev/zero'):  # the second never ends
        with pytest.raises(UserError, match=f"no file '{device}'"):
            p.sha256(device)


def test_digests_follow_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is read again only if its size or times change; a folder depends on each of its files."""
    before, base = p.sha256(folder / 'style.safetensors'), p.sha256(folder / 'base')
    reads: list[str] = []
    real = open
    monkeypatch.setattr('builtins.open', lambda file, *a, **k: (reads.append(str(file)), real(file, *a, **k))[1])
    assert p.sha256(folder / 'style.safetensors') == before and p.sha256(folder / 'base') == base and not reads
    stat = (folder / 'base/unet/w.safetensors').stat()
    (folder / 'base/unet/w.safetensors').write_bytes(b'y' * stat.st_size)
    os.utime(folder / 'base/unet/w.safetensors', ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    assert p.sha256(folder / 'base') != base
    (folder / 'style.safetensors').rename(folder / 'base' / 'style.safetensors')
    moved = p.sha256(folder / 'base')
    (folder / 'base' / '.cache').mkdir()
    (folder / 'base' / '.cache' / 'note').write_text('x')
    assert p.sha256(folder / 'base') == moved


def test_the_number_of_files_is_limited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('diffengine_sdxl.commands.infer.digests.MAX_FILES', 1)
    with pytest.raises(UserError, match='more than 1 files'):
        p.sha256(folder / 'base')


def test_inputs_in_memory(folder: Path) -> None:
    """They have digests of their content; the image cannot be made again, and the error names each."""
    picture, array = Image.new('RGB', (2, 3), (1, 2, 3)), torch.arange(8.0).reshape(4, 1, 2)
    found = p.inputs(Request.of({'image': picture, 'latents': array, 'conditions': {'a': b'x'}}))
    assert {e['key']: e['path'] for e in found} == dict.fromkeys(('image', 'conditions.a', 'latents'))
    digests = {e['sha256'] for e in found}
    for other in (Image.new('RGB', (3, 2), (1, 2, 3)), Image.new('RGB', (2, 3), (1, 2, 4)), array.bfloat16(),
                  array.reshape(4, 2, 1), array.bool(), np.arange(8.0)):
        digests.add(p.inputs(Request.of({'image': other}))[0]['sha256'])
    assert len(digests) == 9 and p.inputs(Request.of({'image': picture.copy()}))[0]['sha256'] == found[0]['sha256']
    path, _ = written(folder, image=picture, latents=array)
    with pytest.raises(UserError, match='image was in memory, not in a file; latents was in memory'):
        u.check_unchanged(u.read_png(path))


def test_changed_files_are_refused(folder: Path) -> None:
    path, _ = written(folder)
    assert u.check_unchanged(u.read_png(path)) == ['conditions.face.mask', 'model.vae', 'model.adapters.depth.weights']
    old = sha(folder / 'style.safetensors')
    (folder / 'style.safetensors').write_bytes(b'other')
    (folder / 'b.png').unlink()
    (folder / 'base' / 'more.txt').write_text('x')
    with pytest.raises(UserError) as caught:
        u.check_unchanged(u.read_png(path))
    words = str(caught.value)
    assert f"conditions.depth.0 ('{folder / 'b.png'}') is missing" in words
    assert (f"model.adapters.style.weights ('{folder / 'style.safetensors'}') has changed (SHA-256 "
            f"{sha(folder / 'style.safetensors')[:SHORT]}, was {old[:SHORT]})") in words
    assert 'model.pretrained' in words and words.count(';') == 2 and 'refiner' not in words


def test_a_forged_list_of_files_is_refused(folder: Path) -> None:
    """Settings may list another file than they name, or none."""
    _, settings = written(folder)
    settings = json.loads(json.dumps(settings))
    settings['config']['model']['adapters']['style']['weights'] = str(folder / 'z.safetensors')
    with pytest.raises(UserError, match="style.weights is '.*z.safetensors', and the image was made of '.*style"):
        u.check_unchanged(settings)
    with pytest.raises(UserError, match='image is .*conditions.depth.0 is .*weights is'):
        u.check_unchanged({**settings, 'inputs': [], 'sources': []})
    _, settings = written(folder)
    for part, key in (('inputs', 'image'), ('sources', 'style.weights')):
        entries = [{**entry, 'sha256': None} for entry in settings[part]]
        with pytest.raises(UserError, match=rf'{key} .* has no SHA-256'):
            u.check_unchanged({**settings, part: entries})


@pytest.mark.parametrize(('change', 'words'), [
    ({'model.type': 'os.system'}, "model.type='os.system'"), ({'model.type': 'this'}, "model.type='this'"),
    ({'model.type': ['SDXL']}, 'model.type='), ({'model.type': 'mmengine::BaseModel'}, 'model.type='),
    ({'model.type': 'BaseDataPreprocessor'}, 'model.type='),
    ({'model.adapters.style.type': 'subprocess.Popen'}, "model.adapters.style.type='subprocess.Popen'"),
    ({'model.sampler.scheduler.type': 'os.system'}, 'model.sampler.scheduler.type='),
    ({'model.sampler.scheduler.type': 'this'}, 'model.sampler.scheduler.type='),
    ({'model.adapters.style.type': 'DDIMScheduler'}, 'model.adapters.style.type='),
    ({'model.sampler.guidances': [{'type': 'builtins.exec'}]}, "model.sampler.guidances.0.type='builtins.exec'"),
    ({'refiner.type': 'torch.load'}, "refiner.type='torch.load'"),
    ({'infer_cfg.a': {'type': 'os.system'}}, "infer_cfg.a.type='os.system'"),
    ({'custom_imports': {'imports': ['this']}}, "'custom_imports'"), ({'default_scope': 'this'}, "'default_scope'"),
    ({'work_dir': '/'}, "'work_dir'"), ({'model.cache_dir': '/etc'}, "'model.cache_dir'"),
    ({'model._scope_': 'this'}, "'model._scope_'"), ({'model.adapters.style._delete_': True}, '_delete_'),
    ({'model.x': {'custom_imports': {}}}, "'model.x.custom_imports'"),
])
def test_untrusted_configs_name_no_code(folder: Path, change: dict[str, Any], words: str) -> None:
    _, settings = written(folder)
    config = json.loads(json.dumps(settings['config']))
    u.check_types(config)
    for key, value in change.items():
        *parents, last = key.split('.')
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    sys.modules.pop('this', None)
    with pytest.raises(UserError, match='PNG must') as caught:
        u.check_unchanged({**settings, 'config': config})
    assert words in str(caught.value) and 'this' not in sys.modules


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def itxt(text: bytes, flag: bytes = b'\0') -> bytes:
    return chunk(b'iTXt', b'diffengine_sdxl\0' + flag + b'\0\0\0' + text)


SIGNATURE, END = b'\x89PNG\r\n\x1a\n', chunk(b'IEND', b'')


@pytest.mark.parametrize(('data', 'words'), [
    (b'', 'is not a PNG'), (b'GIF89a..', 'is not a PNG'), (SIGNATURE, 'cut off'), (SIGNATURE + END[:-1], 'cut off'),
    (SIGNATURE + END, 'holds no settings'), (SIGNATURE + chunk(b'tEXt', b'diffengine_sdxl\0{}') + END, 'no settings'),
    (SIGNATURE + itxt(b'{') + END, 'damaged'), (SIGNATURE + itxt(b'\xff') + END, 'damaged'),
    (SIGNATURE + itxt(b'[' * 100_000) + END, 'damaged'), (SIGNATURE + itxt(b'{}')[:-1] + b'x' + END, 'damaged'),
    (SIGNATURE + itxt(b'{}') + b'\xff\xff\xff\xff' + END[4:], 'cut off'), (SIGNATURE + itxt(b'{}'), 'cut off'),
    (SIGNATURE + itxt(b'[1]') + END, 'format None'), (SIGNATURE + itxt(b'{"format": 2}') + END, 'format 2; this'),
    (SIGNATURE + itxt(zlib.compress(b'{}'), b'\1') + END, 'compressed'),
    (SIGNATURE + itxt(b'{"format": 1}') + END, "'request'"),
    (SIGNATURE + itxt(b' ' * (4 * 2**20 + 999)) + END, 'at most 4194304'),
], ids=range(17))
def test_other_files_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / 'x.png').write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        u.read_png(tmp_path / 'x.png')
    assert str(tmp_path / 'x.png') in str(caught.value)


@pytest.mark.parametrize(('key', 'value'), [
    ('request', []), ('request', {'prompt': 3}), ('request', {'unknown': 3}), ('config', {}), ('config', {'model': 3}),
    ('config', {'model': {'adapters': []}}), ('config', {'model': {'adapters': {'a': 3}}}), ('inputs', {}),
    ('config', {'model': {'sampler': {'guidances': [3]}}}), ('config', {'model': {'sampler': {'scheduler': []}}}),
    ('config', {'model': {}, 'refiner': 3}), ('inputs', [{'key': 'image', 'path': '/'}]), ('weights', 3), ('made', 3),
    ('sources', [{'key': 3, 'path': None, 'sha256': None}]), ('sources', [{'key': 'a', 'path': 3, 'sha256': None}])])
def test_settings_of_another_form_are_refused(folder: Path, key: str, value: Any) -> None:
    path, settings = written(folder)
    path.write_bytes(SIGNATURE + itxt(json.dumps({**settings, key: value}).encode()) + END)
    with pytest.raises(UserError, match='The settings in .* are invalid'):
        u.read_png(path)


def test_no_file_and_no_room(folder: Path) -> None:
    with pytest.raises(UserError, match='cannot be read'):
        u.read_png(folder)
    (folder / 'file').write_text('x')
    settings = p.record(request_of(folder), config_of(folder))
    with pytest.raises(UserError, match='could not be written'):
        p.write_png(Image.new('RGB', (2, 2)), folder / 'file' / 'x.png', settings)
    with pytest.raises(UserError, match='at most 4194304'):
        p.write_png(Image.new('RGB', (2, 2)), folder / 'x.png', {**settings, 'made': {'x': 'y' * 2**22}})
    assert not (folder / 'x.png').exists() and not list(folder.glob('.*'))
