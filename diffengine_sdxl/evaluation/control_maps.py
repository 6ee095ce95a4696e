"""Control fidelity of maps: F1 of Canny edges, SSIM of soft edges, RMSE of depth.

Source: Li et al. 2024, ControlNet++, arXiv:2404.07987, and the evaluation that its authors publish; docs/metrics.md
says where these differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.evaluation.control import MapMetric
from diffengine_sdxl.evaluation.libraries import torchmetrics
from diffengine_sdxl.registry import METRICS

#: MS-SSIM halves an image four times, and its window of 11 pixels must still fit.
MIN_MULTI_SCALE = 176


@METRICS.register_module()
class CannyF1(MapMetric):
    """F1 of the image's edge pixels against those of the condition, averaged over images.

    An edge is white on black, cut at half. Precision is the share of the image's edge pixels that are edges of the
    condition, recall the share of the condition's that are edges of the image. If neither has any, F1 is 1; if one has
    none, 0.

    Args:
        extractor: of the edges; None for OpenCV's Canny at 100 and 200, as in the ControlNet examples. Other thresholds
            are part of the metric's name.
        tolerance: pixels, along either axis, by which an edge may lie off. 0: the very pixel, as published figures. 1
            or 2 suits conditions whose lines are thicker than Canny's.
        kwargs: see ControlMetric.
    """

    name = 'canny_f1'

    def __init__(self, extractor: Mapping[str, Any] | None = None, tolerance: int = 0, **kwargs: Any) -> None:
        config = extractor or {'type': 'Canny'}
        thresholds = config.get('low', 100), config.get('high', 200)
        self.tolerance = whole_number('CannyF1: tolerance', tolerance, 0)
        self.name += '' if thresholds == (100, 200) else '_{:g}_{:g}'.format(*thresholds)
        self.name += f'_within_{tolerance}' if tolerance else ''
        super().__init__(config, **kwargs)

    def score(self, found: np.ndarray, truth: np.ndarray) -> float:
        """Return F1, 0..1."""
        edges, wanted = found >= 128, truth >= 128
        if not edges.any() or not wanted.any():
            return float(edges.any() == wanted.any())
        precision, recall = self._near(wanted)[edges].mean(), self._near(edges)[wanted].mean()
        return float(2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0

    def _near(self, edges: np.ndarray) -> np.ndarray:
        """Return where an edge lies within the tolerance, bool [H, W]."""
        import cv2
        side = 2 * self.tolerance + 1
        return cv2.dilate(edges.astype(np.uint8), np.ones((side, side), np.uint8)) > 0


@METRICS.register_module()
class SoftEdgeSSIM(MapMetric):
    """SSIM of soft edges or line art, white on black, averaged over images.

    Args:
        extractor: such as dict(type='Preprocessor', function='controlnet_aux:HEDdetector.from_pretrained', ...); the
            function is part of the metric's name.
        multi_scale: MS-SSIM, which ControlNet++'s published figures are; of images from 176 pixels on.
        kwargs: see ControlMetric.

    Source: Wang et al. 2004, Image Quality Assessment: From Error Visibility to Structural Similarity, and 2003,
    Multi-Scale Structural Similarity; by torchmetrics with its defaults (a Gaussian window of 11 pixels, sigma 1.5).
    """

    name = 'softedge'
    bounds = (-1.0, 1.0)

    def __init__(self, extractor: Mapping[str, Any], multi_scale: bool = False, **kwargs: Any) -> None:
        self.multi_scale = multi_scale
        self.name += '_ms_ssim' if multi_scale else '_ssim'
        made_by = str(extractor.get('function') or extractor['type']).rpartition(':')[2].partition('.')[0]
        self.name += f'_{made_by}'
        super().__init__(extractor, **kwargs)

    def score(self, found: np.ndarray, truth: np.ndarray) -> float:
        """Return SSIM, -1..1.

        Raises:
            UserError: the image is too small for several scales.
        """
        if self.multi_scale and min(found.shape) < MIN_MULTI_SCALE:
            raise UserError(f'SoftEdgeSSIM(multi_scale=True): an image of {list(found.shape)} (height, width) is too '
                            f'small; both must be at least {MIN_MULTI_SCALE} pixels. Set multi_scale=False.')
        maps = [torch.from_numpy(values / np.float32(255))[None, None] for values in (found, truth)]
        library = torchmetrics('functional.image')
        compare = (library.multiscale_structural_similarity_index_measure if self.multi_scale else
                   library.structural_similarity_index_measure)
        return float(compare(*maps, data_range=1.0))


@METRICS.register_module()
class DepthRMSE(MapMetric):
    """Root of the mean squared difference of two depth maps, averaged over images.

    Both are scaled to 0..255 by their own smallest and largest value, so only relative depth counts.

    Args:
        extractor: config of `Depth`; its model is part of the metric's name, unless it is Intel/dpt-large.
        kwargs: see ControlMetric.
    """

    name = 'depth_rmse'
    better = -1
    bounds = (0.0, 255.0)

    def __init__(self, extractor: Mapping[str, Any], **kwargs: Any) -> None:
        model = str(extractor.get('model', ''))
        self.name += '' if model in ('', 'Intel/dpt-large') else f'_{model.rstrip("/").rpartition("/")[2]}'
        super().__init__(extractor, **kwargs)

    def score(self, found: np.ndarray, truth: np.ndarray) -> float:
        """Return the RMSE, 0..255."""
        return float(np.sqrt(np.mean((_stretched(found) - _stretched(truth)) ** 2)))


def _stretched(depth: np.ndarray) -> np.ndarray:
    """Scale a map to 0..255, fp64; one without any relief becomes 0."""
    low, high = float(depth.min()), float(depth.max())
    return (depth - low) * (255 / (high - low)) if high > low else np.zeros(depth.shape)
