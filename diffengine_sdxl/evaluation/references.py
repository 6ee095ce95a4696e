"""What images are compared with: an image of the sample itself, or the images of a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_dist_info
from PIL import Image
from torch import Tensor

from diffengine_sdxl.errors import UserError, listed, whole_number
from diffengine_sdxl.pixel_values import as_floats
from diffengine_sdxl.registry import DATASETS

#: Images of a data set that a network sees at once.
BATCH_SIZE = 16


def sample_images(batch: Mapping[str, Any], key: str, owner: str) -> Tensor:
    """Return the images of a batch's entry as a PNG holds them, fp32 [B, 3, H, W] in [0, 1] on the CPU.

    Args:
        batch: as metrics get it: 'img' in [-1, 1], other images in [0, 1].
        key: of the entry.
        owner: the metric, for the message.

    Raises:
        UserError: the entry holds no images.
    """
    images = batch[key]
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"{owner} compares with '{key}' of each sample, an image of 1 or 3 channels, and that is "
                        f'{list(images.shape) if isinstance(images, Tensor) else type(images).__name__}.')
    return _in_8_bits(images, key).expand(-1, 3, -1, -1)


def _in_8_bits(images: Tensor, key: str) -> Tensor:
    floats = as_floats(images.cpu(), centred=key == 'img').float()
    return ((floats + 1) / 2 if key == 'img' else floats).clamp(0, 1).mul(255).round().div(255)


class DatasetFeatures:
    """Features of the images of a data set; every process reads its share of the rows, once.

    Args:
        dataset: its config, built through DATASETS; the key 'img' of its samples is read.
        features: images [B, 3, H, W] in [0, 1] and a device -> [B, D].
        max_samples: use so many rows, evenly spaced; None: all.
        owner: the metric, for messages.
    """

    def __init__(self, dataset: Mapping[str, Any], features: Callable[[Tensor, torch.device], np.ndarray],
                 max_samples: int | None, owner: str) -> None:
        self.config, self.features, self.owner = dataset, features, owner
        self.max_samples = None if max_samples is None else whole_number(f'{owner}: max_samples', max_samples, 2)
        self._dataset: Any = None
        self._computed: np.ndarray | None = None

    @property
    def dataset(self) -> Any:
        """The data set, built when it is first asked for.

        Raises:
            UserError: its config is wrong, or it is a stream.
        """
        if self._dataset is None:
            self._dataset = DATASETS.build(dict(self.config))
            if isinstance(self._dataset, torch.utils.data.IterableDataset):
                raise UserError(f'{self.owner}: the data set {self.config.get("type")} is a stream; images to compare '
                                'with need data of known length: HFDataset, with max_samples if it is large.')
        return self._dataset

    def __len__(self) -> int:
        """Return the number of images."""
        return min(len(self.dataset), self.max_samples or len(self.dataset))

    def compute(self, device: torch.device) -> np.ndarray:
        """Return the features of all images, fp32 [N, D]; all processes call this, and all get them."""
        if self._computed is None:
            rank, world = get_dist_info()
            here: dict[int, np.ndarray] = {}
            # Whole batches, as kernels choose by batch size: the numbers do not depend on the number of processes.
            for start in range(rank * BATCH_SIZE, len(self), world * BATCH_SIZE):
                numbers = range(start, min(start + BATCH_SIZE, len(self)))
                images = {number: self._image(number) for number in numbers}
                for size in dict.fromkeys(image.shape for image in images.values()):
                    some = [number for number, image in images.items() if image.shape == size]
                    rows = self.features(torch.stack([images[number] for number in some]), device)
                    here.update(zip(some, rows, strict=True))
            gathered = {number: row for rows in all_gather_object(here) for number, row in rows.items()}
            self._computed = np.stack([gathered[number] for number in range(len(self))])
        return self._computed

    def _image(self, number: int) -> Tensor:
        """Return an image [3, H, W] in [0, 1]."""
        sample = self.dataset[number * len(self.dataset) // len(self)]
        image = sample.get('img') if isinstance(sample, Mapping) else None
        if isinstance(image, Image.Image):  # a data set without PackInputs
            image = torch.from_numpy(np.array(image.convert('RGB'))).permute(2, 0, 1)
        if not isinstance(image, Tensor):
            only = f', only {listed(sample, 20)}' if isinstance(sample, Mapping) else ''
            raise UserError(f"{self.owner}: a sample of {self.config.get('type')} has no image 'img'{only}.")
        return _in_8_bits(image[None], 'img')[0]
