"""The header of exported files: fields that UIs show, beside what the format's readers need; tensors as they were."""

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffengine_sdxl.adapters.formats import modelspec
from diffengine_sdxl.errors import UserError


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework='pt') as file:
        return dict(file.metadata())


def test_a_stamp(tmp_path: Path) -> None:
    """Tensors and other entries stay; fields replace older ones; the hash is that of the tensors' bytes."""
    tensors = {'a': torch.randn(3, 5), 'b': torch.arange(7, dtype=torch.float16)}
    path = tmp_path / 'sub' / 'x.safetensors'
    path.parent.mkdir()
    save_file(tensors, path, metadata={'lora_adapter_metadata': '{"r": 4}', 'modelspec.title': 'old',
                                       'modelspec.implementation': 'sgm'})
    for title in ('one', 'a longer title, for which the header grows, \N{GREEK SMALL LETTER ALPHA}'):
        modelspec.stamp(tmp_path, {'modelspec.title': title, 'modelspec.license': 'CC0'})
        read = load_file(path)
        assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in tensors.items())
        data = path.read_bytes()
        size = int.from_bytes(data[:8], 'little')
        digest = hashlib.sha256(data[8 + size:]).hexdigest()
        assert size % 8 == 0 and json.loads(data[8:8 + size])
        assert header(path) == {
            'lora_adapter_metadata': '{"r": 4}', 'modelspec.title': title, 'modelspec.implementation': 'sgm',
            'modelspec.license': 'CC0', 'modelspec.sai_model_spec': '1.0.0', 'format': 'pt',
            'modelspec.hash_sha256': f'0x{digest}', 'sshs_model_hash': digest}
    assert [p.name for p in path.parent.iterdir()] == ['x.safetensors']


def test_what_a_user_says(tmp_path: Path) -> None:
    Image.new('RGBA', (1000, 500), (255, 0, 0, 255)).save(tmp_path / 'x.png')
    fields = modelspec.from_user(dict(license='CC0', tags=['a', 'b'], trigger_words=['sks dog', 'ohwx'],
                                      thumbnail=str(tmp_path / 'x.png')), 'metadata')
    kind, _, data = fields.pop('modelspec.thumbnail').partition(';base64,')
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (kind, image.format, image.size) == ('data:image/jpeg', 'JPEG', (256, 128))
    assert fields == {'modelspec.license': 'CC0', 'modelspec.tags': 'a, b', 'modelspec.trigger_phrase': 'sks dog, ohwx'}
    assert modelspec.from_user(None, 'metadata') == {}
    (tmp_path / 'no.png').write_text('no image')
    for wrong, words in ((dict(titel='x'), "metadata.titel: .*Did you mean 'title'"), (dict(license=3), 'license=3'),
                         (dict(thumbnail=str(tmp_path / 'none.png')), 'none.png.*cannot be read|none.png'),
                         (dict(thumbnail=str(tmp_path / 'no.png')), "no.png' is not an image")):
        with pytest.raises(UserError, match=words):
            modelspec.from_user(wrong, 'metadata')


def test_what_an_export_says_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / 'base.safetensors'
    base.write_bytes(b'weights')
    config: dict[str, Any] = {'resolution': (64, 32), 'model': {'pretrained': str(base)}}
    fields = modelspec.of_export(config, 'LoRA', 'mine', 'v_prediction', ['<a>', '<b>'])
    assert fields.pop('modelspec.date')[:2] == '20'
    assert fields == {
        'modelspec.architecture': 'stable-diffusion-xl-v1-base/lora', 'modelspec.title': 'mine',
        'modelspec.resolution': '32x64', 'modelspec.prediction_type': 'v', 'modelspec.trigger_phrase': '<a>, <b>',
        'ss_base_model_version': 'sdxl_base_v1-0', 'ss_sd_model_name': 'base.safetensors',
        'ss_new_sd_model_hash': hashlib.sha256(b'weights').hexdigest()}
    # A base of the hub: the cache's blob has the name; nothing is read, nor asked for. One that is gone has no hash.
    cache, commit, blob = tmp_path / 'hub' / 'models--me--base', '0' * 40, 'ab' * 32
    for folder in ('refs', 'blobs', f'snapshots/{commit}/unet'):
        (cache / folder).mkdir(parents=True)
    (cache / 'refs' / 'main').write_text(commit)
    (cache / 'blobs' / blob).write_bytes(b'other')
    (cache / f'snapshots/{commit}/unet/diffusion_pytorch_model.fp16.safetensors').symlink_to(cache / 'blobs' / blob)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    model = dict(pretrained='me/base', cache_dir=str(tmp_path / 'hub'))
    assert modelspec.base_hash(model) == modelspec.base_hash({**model, 'variant': 'fp16'}) == blob
    assert modelspec.base_hash({**model, 'pretrained': 'me/gone'}) is None
    assert modelspec.base_hash({'pretrained': str(tmp_path / 'gone')}) is modelspec.base_hash({}) is None
