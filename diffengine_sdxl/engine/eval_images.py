"""The images of an evaluation: from keyed noise, in 8 bits. Those of a test are files, which the next one uses."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffengine_sdxl import atomic_files, rng
from diffengine_sdxl.cache.keys import digest
from diffengine_sdxl.config.references import differences, to_plain
from diffengine_sdxl.errors import UserError, count_of, first_line, listed
from diffengine_sdxl.images import to_pil
from diffengine_sdxl.models.generate import BASE, COMPARED, ONLY
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Batch
from diffengine_sdxl.versions import versions

#: Keys of configs that change no image.
IGNORED_MODEL_KEYS = ('gradient_checkpointing', 'cache_dir', 'lazy_encoders', 'objective', 'partners', 'seed',
                      'trainable')
#: What changes no row of a data set: where it keeps files, what it gives to metrics only, and where it ends.
IGNORED_DATA_KEYS = ('cache_dir', 'extra_columns', 'truth', 'max_samples', 'length')
#: Of the text in a PNG that says what made it, beside the record's settings.
TEXT = 'made_from'
#: The condition images, beside the image sets.
CONDITIONS = 'conditions'


def noise_seed(seed: int, key: str) -> int:
    """Return the generator's seed of a sample's noise, of an evaluation's seed; `infer --seed` takes it."""
    return rng.key_seed('evaluation', seed, key)


@torch.no_grad()
def make_images(model: SDXL, batch: Batch, seed: int, image_set: str) -> list[Image.Image]:
    """Return the images of a batch, each from noise of its own, which is the same for all image sets.

    Raises:
        UserError: one is not finite; or see Sampler.
    """
    noise = torch.tensor([noise_seed(seed, key) for key in batch.key], dtype=torch.int64)
    made = model.image_sets[-1] if image_set == COMPARED else image_set
    images = []
    for sample in model(replace(batch, seed=noise), mode='predict', image_sets=[made]):
        image = sample['images'][made].float().cpu()
        if not bool(image.isfinite().all()):
            raise UserError(f"The image '{image_set}' of sample '{sample['key']}' is not finite and cannot be "
                            'measured; the model has diverged, or overflows in its dtype.')
        images.append(to_pil(image.numpy()))
    return images


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as fp32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def condition_images(conditions: Mapping[str, Tensor], row: int) -> dict[str, Image.Image]:
    """Return the conditions of a row of a batch that are images, by name."""
    return {name: to_pil(x[row].float().cpu().numpy()) for name, x in conditions.items()
            if x.dim() == 4 and x.shape[1] in (1, 3)}


class ImageFiles:
    """The images of a test as PNG files, and `record.json`, which says what made those of each image set.

    Args:
        folder: `test/images` of a work_dir; image `<image set>/<position>_seed<s>.png`, position is the row.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, folder / 'record.json'

    def path(self, image_set: str, position: int, seed: int) -> Path:
        """Return where an image lies."""
        return self.folder / image_set / f'{position:06d}_seed{seed}.png'

    def claim(self, records: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any], results: Sequence[Path] = ()
              ) -> list[str]:
        """Remove the images of image sets that something else made, and write what makes them now.

        Conditions go with them, and the results of any other test: killed, this one leaves no numbers of others.

        Args:
            records: image set -> `image_records`.
            about: of the test as a whole, for people and model cards.
            results: files that a test leaves at its end.

        Returns:
            A sentence for each image set whose images were removed.
        """
        old, before, unknown = {}, {}, 'no record of what made them'
        try:
            if self.record.is_file():
                old = json.loads(self.record.read_text())
                before = dict(old['image_sets'])
        except (KeyError, TypeError, ValueError):  # not ours, or damaged: the images are made again
            unknown = f"'{self.record}', which says what made them, is damaged"
        new = {**to_plain(about), 'image_sets': {**before, **records}}
        if new != old:
            for path in results:
                path.unlink(missing_ok=True)
        sentences = []
        for image_set, record in records.items():
            images = sorted((self.folder / image_set).glob('[0-9]*_seed*.png'))
            if changes := differences(before[image_set], record) if image_set in before else [unknown]:
                for image in (*images, *(self.folder / CONDITIONS).glob('[0-9]*.png')):
                    image.unlink()
                if images:
                    sentences.append(f"The {len(images)} images '{image_set}' of an earlier test are removed and made "
                                     f'again: {listed(changes, 3)}. Another --work-dir would keep both.')
            else:
                sentences += self._remove_damaged(images)
        with atomic_files.replacing(self.record) as temporary:
            temporary.write_text(json.dumps(new, indent=1) + '\n')
        return sentences

    def _remove_damaged(self, images: Sequence[Path]) -> list[str]:
        """Remove those of `images` that no test can have left; return a sentence if there are any."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            known = pool.map(self.made_from, images)
            damaged = [image for image, made in zip(images, known, strict=True) if made is None]
        for image in damaged:
            image.unlink()
        return [f'{count_of(len(damaged), "image is", "images are")} damaged, or of no test, and made again: '
                f'{listed(damaged, 3)}.'] if damaged else []

    def missing(self, image_sets: Iterable[str], rows: Sequence[int], seeds: Iterable[int]) -> list[tuple[int, str]]:
        """Return the (seed, image set) of a batch of which at least one image is not there."""
        return [(seed, image_set) for seed in seeds for image_set in image_sets
                if not all(self.path(image_set, row, seed).is_file() for row in rows)]

    def save(self, path: Path, image: Image.Image, made_from: Mapping[str, Any] | None = None) -> None:
        """Write an image, whole or not at all.

        Raises:
            UserError: the disk is full or not writable.
        """
        info = PngInfo()
        info.add_text(TEXT, json.dumps(made_from or {}))  # ASCII: a lone surrogate in a prompt has no other encoding
        with atomic_files.replacing(path) as temporary:
            # A third of the time of the default level, for a tenth more bytes.
            image.save(temporary, format='PNG', pnginfo=info, compress_level=1)

    def made_from(self, path: Path) -> dict[str, Any] | None:
        """Return what `save` was told about an image; None if it is missing, damaged or from elsewhere."""
        try:
            with Image.open(path, formats=['PNG']) as image:
                made: dict[str, Any] = dict(json.loads(image.info[TEXT]))
                image.verify()  # checksums, to the end of the file
                return made
        except (OSError, ValueError, SyntaxError, KeyError, TypeError):  # Pillow raises the first three
            return None

    def read(self, path: Path) -> Image.Image:
        """Read an image.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            with Image.open(path, formats=['PNG']) as image:
                return image.convert('RGB')
        except FileNotFoundError:
            raise UserError(f"There is no image '{path}'. If the processes of this test run on several machines, they "
                            'need one work_dir that all of them see.') from None
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for damaged files
            raise UserError(f"The image '{path}' is damaged ({first_line(error)}); test again, which makes it anew."
                            ) from error


def made_from(model: SDXL, data: Mapping[str, Any], row: int, seed: int, image_set: str) -> dict[str, Any]:
    """Return what decides the image of a row of a batch, beside `image_records`.

    Args:
        data: as the loader collated it: in 8 bits, the same on every device.

    Returns:
        'key', 'prompt' and 'noise_seed'; 'batch_size', as the last batch is smaller; and 'conditions', a digest of
        those that adapters read, '' for none.
    """
    key = data['key'][row]
    keys = [key for name, adapter in model.adapters.items() if acts_in(name, image_set)
            for key in (adapter.condition_key, getattr(adapter, 'mask', None)) if key]
    # An image prompt may have its embeddings and its mask under longer names.
    read = {name: _digest(value[row]) for name, value in data.items()
            if isinstance(value, Tensor) and name.startswith(tuple(keys))}
    return {'key': key, 'prompt': data['text'][row], 'noise_seed': noise_seed(seed, key),
            'batch_size': len(data['key']), 'conditions': digest(read)[:16] if read else ''}


def acts_in(adapter: str, image_set: str) -> bool:
    """Return whether an adapter takes part in making an image set."""
    return image_set != BASE and (not image_set.startswith(ONLY) or image_set == f'{ONLY}{adapter}')


def image_records(model: SDXL, config: Mapping[str, Any], image_sets: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return what decides the images of each image set, as plain data, with the model's present weights.

    Args:
        model: its weights count by content, wherever they come from.
        config: the resolved config of the test: `model`, `speed`, and `test_dataloader`, whose `batch_size` counts,
            as kernels choose by it.
        image_sets: those that are made with these weights.
    """
    weights, loader = weights_digests(model), config['test_dataloader']
    settings = {k: v for k, v in config['model'].items() if k not in IGNORED_MODEL_KEYS}
    packages = {name: versions()[name] for name in ('torch', 'diffusers', 'transformers', 'peft')}
    data = {k: v for k, v in loader['dataset'].items() if k not in IGNORED_DATA_KEYS}
    records = {}
    for image_set in image_sets:
        # Without some of its adapters the model computes as one that has not got them.
        acting = {name: config for name, config in (settings.get('adapters') or {}).items() if acts_in(name, image_set)}
        records[image_set] = to_plain({
            'weights': {name: d for name, d in weights.items() if name == BASE or acts_in(name, image_set)},
            'model': {k: v for k, v in settings.items() if k != 'adapters'} | ({'adapters': acting} if acting else {}),
            'speed': config.get('speed'), 'dataset': data,
            'batch_size': loader.get('batch_size') or 1, 'versions': packages})
    return records


def weights_digests(model: SDXL, names: Collection[str] | None = None) -> dict[str, str]:
    """Return the digest of the base's weights, and of each adapter's, wherever in the model they live.

    Args:
        model: with its present weights.
        names: 'base' and names of adapters; None: all.
    """
    owners = {id(p): name for name, adapter in model.adapters.items() for p in adapter.all_parameters()}
    tensors: dict[str, list[Tensor]] = {BASE: [], **{name: [] for name in model.adapters}}
    for tensor in [*model.parameters(), *model.buffers()]:
        tensors[owners.get(id(tensor), BASE)].append(tensor.detach())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Sorted, and without names: where an adapter wraps a layer, the layer's own weights have others.
        return {name: digest(sorted(pool.map(_digest, parts))) for name, parts in tensors.items()
                if names is None or name in names}


def _digest(tensor: Tensor) -> str:
    state = hashlib.blake2b(f'{tensor.dtype} {tuple(tensor.shape)}'.encode(), digest_size=16)
    # As bytes first: numpy has no bfloat16. hashlib computes without the interpreter's lock.
    state.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
