"""What UIs show of a file of weights: ModelSpec's fields, and the base, in the header of exported .safetensors files.

Sources: Stability-AI/ModelSpec 1.0.0; sd-scripts' library/sai_model_spec.py and train_network.py (the `ss_` keys of the
base and `sshs_model_hash`, which A1111 and others read).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from diffengine_sdxl.errors import UserError, did_you_mean, first_line
from diffengine_sdxl.loading import hub
from diffengine_sdxl.loading.files import weight_files
from diffengine_sdxl.loading.strict import shipped

#: What a user may say of an export -> ModelSpec's field.
SETTINGS = {**{name: name for name in ('title', 'description', 'author', 'license', 'usage_hint', 'tags', 'thumbnail')},
            'trigger_words': 'trigger_phrase'}
#: An adapter's class -> its suffix in ModelSpec's architecture.
_KINDS = {'LoRA': 'lora', 'TextualInversion': 'textual-inversion', 'ControlNet': 'controlnet',
          'T2IAdapter': 't2i-adapter', 'IPAdapter': 'ip-adapter', 'ImageEncoder': 'image-encoder'}
#: Side of a thumbnail in pixels, as ModelSpec recommends.
THUMBNAIL = 256


def from_user(settings: Mapping[str, Any] | None, key: str) -> dict[str, str]:
    """Return the fields that a user sets.

    Args:
        settings: keys of SETTINGS -> text; of `tags` and `trigger_words` also a list; of `thumbnail` an image's path.
        key: where they stand in the config, for errors.

    Raises:
        UserError: a key is unknown, a value is no text, or the thumbnail cannot be read.
    """
    fields = {}
    for name, value in (settings or {}).items():
        if name not in SETTINGS:
            raise UserError(f'{key}.{name}: there is no such entry.{did_you_mean(name, SETTINGS)} They are: '
                            f'{", ".join(SETTINGS)}.')
        if name in ('tags', 'trigger_words') and isinstance(value, list | tuple):
            value = ', '.join(map(str, value))
        if not isinstance(value, str):
            raise UserError(f'{key}.{name}={value!r} must be a text.')
        fields[f'modelspec.{SETTINGS[name]}'] = _thumbnail(value, key) if name == 'thumbnail' else value
    return fields


def _thumbnail(path: str, key: str) -> str:
    try:
        with Image.open(path) as image:
            image.draft('RGB', (2 * THUMBNAIL, 2 * THUMBNAIL))
            small = image.convert('RGB')
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{key}.thumbnail='{path}' is not an image that can be read: {first_line(error)}") from error
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, 'JPEG')
    return f'data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}'


def of_export(config: Mapping[str, Any], kind: str | None, title: str, prediction_type: str = 'epsilon',
              words: Iterable[str] = ()) -> dict[str, str]:
    """Return the fields that an export has without a word of the user's.

    Args:
        config: the resolved config: its `resolution`, and the base and `caption_chunks` in `model`.
        kind: class of the adapter; None for a base.
        title: of the file.
        prediction_type: of the base.
        words: that prompts need.
    """
    size, model = config.get('resolution') or 1024, config.get('model') or {}
    height, width = (size, size) if isinstance(size, int) else size
    source, digest = model.get('unet') or model.get('pretrained'), base_hash(model)
    suffix = '' if kind is None else f'/{_KINDS.get(kind, kind.lower())}'
    fields = {'modelspec.architecture': f'stable-diffusion-xl-v1-base{suffix}', 'modelspec.title': title,
              'modelspec.date': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
              'modelspec.resolution': f'{width}x{height}',
              'modelspec.prediction_type': 'v' if prediction_type == 'v_prediction' else prediction_type,
              'ss_base_model_version': 'sdxl_base_v1-0'}
    if source is not None:
        fields['ss_sd_model_name'] = os.path.basename(str(source).rstrip('/'))
    if digest is not None:
        fields['ss_new_sd_model_hash'] = digest
    if phrase := ', '.join(words):
        fields['modelspec.trigger_phrase'] = phrase
    if model.get('caption_chunks', 1) > 1:
        fields['diffengine_sdxl.caption_chunks'] = str(model['caption_chunks'])
    return fields


def base_hash(model: Mapping[str, Any]) -> str | None:
    """Return the SHA-256 of the base's file, as A1111 and Civitai identify it; of a folder's, that of its UNet's.

    Returns:
        None if the base is random, split into shards, or no longer on this machine.
    """
    source, revision, cache_dir = model.get('unet') or model.get('pretrained'), model.get('revision'), model.get(
        'cache_dir')
    if source is None:
        return None
    try:
        path = _on_disk(str(shipped(source)), revision, cache_dir)
        for folder in () if path is None or path.is_file() else (path / 'unet', path):
            names = os.listdir(folder) if folder.is_dir() else []
            files = next((files for variant in (model.get('variant'), None, 'fp16')
                          if (files := weight_files(names, variant))), [])
            if len(files) == 1:
                path = folder / files[0]
                break
        return None if path is None or not path.is_file() else _sha256(path)
    except (UserError, OSError, ValueError):
        return None


def _on_disk(source: str, revision: str | None, cache_dir: str | None) -> Path | None:
    """Return the local file or folder of a base, without the network."""
    from huggingface_hub import snapshot_download
    linked = hub.parse_file_link(source)
    if linked is None and (local := hub.local_path(source)) is not None:
        return local
    repo, branch, file = linked or (source, None, None)
    commit = hub.commit_in_cache(repo, revision or branch, cache_dir)
    if commit is None:
        return None
    folder = Path(snapshot_download(repo, revision=commit, cache_dir=cache_dir, local_files_only=True,
                                    allow_patterns=[]))
    return folder / file if file else folder


def _sha256(path: Path) -> str:
    """Return a file's SHA-256. In the hub's cache it is the name of the blob that a file is a link to."""
    blob = path.resolve()
    if re.fullmatch('[0-9a-f]{64}', blob.name):
        return blob.name
    stat = blob.stat()
    return _read_sha256(str(blob), stat.st_size, stat.st_mtime_ns)


@lru_cache
def _read_sha256(path: str, size: int, time_ns: int) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def stamp(path: Path, fields: Mapping[str, str]) -> None:
    """Add `fields` and the tensors' SHA-256 to the header of a .safetensors file, or of all in a folder.

    What a format's writer put there stays, but for `fields`; so does every tensor, bitwise.
    """
    for file in [path] if path.is_file() else sorted(path.rglob('*.safetensors')):
        with open(file, 'rb') as source:
            header = json.loads(source.read(int.from_bytes(source.read(8), 'little')))
            start = source.tell()
            digest = hashlib.file_digest(source, 'sha256').hexdigest()
            header['__metadata__'] = {
                'format': 'pt', 'modelspec.sai_model_spec': '1.0.0', 'modelspec.implementation': 'diffusers',
                **header.get('__metadata__', {}), **fields,
                'modelspec.hash_sha256': f'0x{digest}', 'sshs_model_hash': digest}
            text = json.dumps(header, separators=(',', ':')).encode()
            # Tensors are mapped into memory, and kernels differ in the last bits by how they are aligned there: as the
            # writer aligned them, so that weights that were loaded, trained and saved compute as before.
            text += b' ' * ((start - 8 - len(text)) % 64)
            temporary = file.with_name(f'.{file.name}.part')
            with open(temporary, 'wb') as target:
                target.write(len(text).to_bytes(8, 'little') + text)
                source.seek(start)
                shutil.copyfileobj(source, target, 2**20)
        os.replace(temporary, file)
