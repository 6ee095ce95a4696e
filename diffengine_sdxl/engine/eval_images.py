"""The images of an evaluation: from keyed noise, in 8 bits. Those of a test are files, which the next one uses."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
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
from diffengine_sdxl.errors import UserError, first_line, listed
from diffengine_sdxl.images import to_pil
from diffengine_sdxl.models.generate import BASE, COMPARED
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Batch
from diffengine_sdxl.versions import versions

#: Keys of configs that change no image.
IGNORED_MODEL_KEYS = ('gradient_checkpointing', 'cache_dir', 'lazy_encoders', 'objective', 'seed', 'trainable')
#: What a data set gives to metrics only, beside where it keeps files.
IGNORED_DATA_KEYS = ('cache_dir', 'extra_columns', 'truth')
#: Of the text in a PNG that says which sample it is of.
TEXT = 'sample'
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

    def claim(self, records: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> list[str]:
        """Remove the images of image sets that something else made, and write what makes them now.

        Args:
            records: image set -> `image_record`.
            about: of the test as a whole, for people and model cards.

        Returns:
            A sentence for each image set whose images were removed.
        """
        try:
            before = json.loads(self.record.read_text())['image_sets'] if self.record.is_file() else {}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            before = {}  # not ours, or damaged: the images are made again
        sentences = []
        for image_set, record in records.items():
            changes = ['no record of what made them'] if image_set not in before else differences(
                before[image_set], record)
            images = [*(self.folder / image_set).glob('[0-9]*_seed*.png')] if changes else []
            for image in images:
                image.unlink()
            if images:
                sentences.append(f"The {len(images)} images '{image_set}' of an earlier test are removed and made "
                                 f'again: {listed(changes, 3)}. Another --work-dir would keep both.')
        with atomic_files.replacing(self.record) as temporary:
            temporary.write_text(json.dumps({**to_plain(about), 'image_sets': {**before, **records}}, indent=1) + '\n')
        return sentences

    def missing(self, image_sets: Iterable[str], rows: Sequence[int], seeds: Iterable[int]) -> list[tuple[int, str]]:
        """Return the (seed, image set) of a batch of which at least one image is not there."""
        return [(seed, image_set) for seed in seeds for image_set in image_sets
                if not all(self.path(image_set, row, seed).is_file() for row in rows)]

    def save(self, path: Path, image: Image.Image, text: str = '') -> None:
        """Write an image, unless it is there, whole or not at all.

        Raises:
            UserError: the disk is full or not writable.
        """
        if path.is_file():
            return
        info = PngInfo()
        info.add_text(TEXT, text)
        with atomic_files.replacing(path) as temporary:
            # A third of the time of the default level, for a tenth more bytes.
            image.save(temporary, format='PNG', pnginfo=info, compress_level=1)

    def read(self, path: Path, text: str) -> Image.Image:
        """Read an image that `save` wrote with this text.

        Raises:
            UserError: it is missing, damaged, or of another sample.
        """
        again = f"remove it, or all of '{self.folder}', and test again"
        try:
            with Image.open(path, formats=['PNG']) as image:
                image.load()
                found = image.convert('RGB'), image.info.get(TEXT)
        except FileNotFoundError:
            raise UserError(f"There is no image '{path}'. If the processes of this test run on several machines, they "
                            'need one work_dir that all of them see.') from None
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for damaged files
            raise UserError(f"The image '{path}' is damaged ({first_line(error)}); {again}.") from error
        if found[1] != text:
            raise UserError(f"The image '{path}' is of {found[1] or 'no sample of a test'}, and the data have {text} "
                            f'there; {again}.')
        return found[0]


def sample_text(key: str, prompt: str, noise: int) -> str:
    """Return what a PNG says of its sample; ASCII, as a lone surrogate in a prompt has no other encoding."""
    return json.dumps({'key': key, 'prompt': prompt, 'noise_seed': noise})


def image_records(model: SDXL, config: Mapping[str, Any], num_samples: int, image_sets: Iterable[str]
                  ) -> dict[str, dict[str, Any]]:
    """Return what decides the images of each image set, as plain data, with the model's present weights.

    Args:
        model: its weights count by content, wherever they come from.
        config: the resolved config of the test: `model`, `speed`, and `test_dataloader`, whose `batch_size` counts,
            as kernels choose by it.
        num_samples: rows of the data that are read; they decide how large the last batch is.
        image_sets: those that are made with these weights.
    """
    weights, loader = _weights(model), config['test_dataloader']
    settings = {k: v for k, v in config['model'].items() if k not in IGNORED_MODEL_KEYS}
    packages = {name: versions()[name] for name in ('torch', 'diffusers', 'transformers', 'peft')}
    data = {k: v for k, v in loader['dataset'].items() if k not in IGNORED_DATA_KEYS}
    records = {}
    for image_set in image_sets:
        # Without its adapters the model computes as one that has none.
        alone = image_set == BASE
        records[image_set] = to_plain({
            'weights': {BASE: weights[BASE]} if alone else weights,
            'model': {k: v for k, v in settings.items() if not (alone and k == 'adapters')},
            'speed': config.get('speed'), 'dataset': data, 'num_samples': num_samples,
            'batch_size': loader.get('batch_size') or 1, 'versions': packages})
    return records


def _weights(model: SDXL) -> dict[str, str]:
    """Return the digest of the base's weights, and of each adapter's, wherever in the model they live."""
    owners = {id(p): name for name, adapter in model.adapters.items() for p in adapter.all_parameters()}
    tensors: dict[str, list[Tensor]] = {BASE: [], **{name: [] for name in model.adapters}}
    for tensor in [*model.parameters(), *model.buffers()]:
        tensors[owners.get(id(tensor), BASE)].append(tensor.detach())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Sorted, and without names: where an adapter wraps a layer, the layer's own weights have others.
        return {name: digest(sorted(pool.map(_digest, parts))) for name, parts in tensors.items()}


def _digest(tensor: Tensor) -> str:
    state = hashlib.blake2b(f'{tensor.dtype} {tuple(tensor.shape)}'.encode(), digest_size=16)
    # As bytes first: numpy has no bfloat16. hashlib computes without the interpreter's lock.
    state.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
