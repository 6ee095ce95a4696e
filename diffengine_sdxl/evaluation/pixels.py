"""How close is an image to its sample's own, pixel by pixel? SSIM, MS-SSIM and PSNR."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation.base import MeanMetric
from diffengine_sdxl.evaluation.libraries import torchmetrics
from diffengine_sdxl.evaluation.references import sample_images
from diffengine_sdxl.registry import METRICS


class PairMetric(MeanMetric):
    """A score of each image beside an image of its sample, of the same size.

    Args:
        reference: entry of the samples with the image to compare with.
        kwargs: see ImageMetric.
    """

    hint = 'Name the entry with the image to compare with: reference=...'
    #: Images must be larger than this, in pixels.
    min_side = 0

    def __init__(self, reference: str = 'img', **kwargs: Any) -> None:
        self.key, self.needs = reference, (reference,)
        super().__init__(**kwargs)

    def measure(self, images: Tensor, batch: Mapping[str, Any]) -> Sequence[float]:
        """Return the score of each image.

        Raises:
            UserError: an image and its reference differ in size, or are too small.
        """
        name, others = type(self).__name__, sample_images(batch, self.key, type(self).__name__)
        size, other = (tuple(x.shape[-2:]) for x in (images, others))
        if size != other:
            raise UserError(f"{name} compares images of one size: those of the model are {size[0]} x {size[1]} pixels "
                            f"(height x width), '{self.key}' of sample '{batch['key'][0]}' is {other[0]} x {other[1]}. "
                            "Resize and Crop the data to the model's size.")
        if min(size) <= self.min_side:
            raise UserError(f'{name} needs images of more than {self.min_side} pixels a side; these are {size[0]} x '
                            f'{size[1]}. Use SSIM.')
        return [float(score) for score in self.compare(images, others)]

    @abstractmethod
    def compare(self, images: Tensor, references: Tensor) -> Tensor:
        """Return the scores [B] of images and references [B, 3, H, W] in [0, 1], on the CPU."""


@METRICS.register_module()
class SSIM(PairMetric):
    """Structural similarity, mean over pixels and channels: Gaussian window of sigma 1.5, data range 1.

    Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity (2004); torchmetrics.
    """

    name, bounds = 'ssim', (-1.0, 1.0)
    min_side = 5

    def compare(self, images: Tensor, references: Tensor) -> Tensor:
        """Return torchmetrics' scores [B]."""
        ssim = torchmetrics('functional.image.ssim').structural_similarity_index_measure
        scores: Tensor = ssim(images, references, data_range=1.0, reduction='none')
        return scores.reshape(-1)


@METRICS.register_module()
class MSSSIM(PairMetric):
    """Multi-scale structural similarity over five scales, 0 to 1, for images of more than 160 pixels a side.

    Source: Wang et al., Multi-scale Structural Similarity for Image Quality Assessment (2003); torchmetrics.
    """

    name = 'ms_ssim'
    min_side = 160

    def compare(self, images: Tensor, references: Tensor) -> Tensor:
        """Return torchmetrics' scores [B]."""
        ms_ssim = torchmetrics('functional.image.ssim').multiscale_structural_similarity_index_measure
        scores: Tensor = ms_ssim(images, references, data_range=1.0, reduction='none')
        return scores.reshape(-1)


@METRICS.register_module()
class PSNR(PairMetric):
    """Peak signal-to-noise ratio in dB, mean over images.

    Of equal images it is infinite, and a mean with it: these count as if one value of one pixel were one level of 255
    off, the closest that two different images of 8 bits can be: 89.0 dB at 64 x 64 pixels, 113.1 at 1024 x 1024.
    """

    name, bounds = 'psnr', (0.0, np.inf)

    def compare(self, images: Tensor, references: Tensor) -> Tensor:
        """Return 10 log10(1 / mean squared error) [B], bounded."""
        errors = (images.double() - references.double()).square().flatten(1)
        least = 1 / (255**2 * errors.shape[1])
        return -10 * torch.log10(errors.mean(dim=1).clamp(min=least))
