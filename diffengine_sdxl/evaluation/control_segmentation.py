"""Control fidelity of segmentation: mean IoU of the classes on the image with the sample's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation.base import Measured, SetMetric
from diffengine_sdxl.evaluation.control import ControlMetric
from diffengine_sdxl.evaluation.networks import Network, NetworkSource, shared
from diffengine_sdxl.registry import METRICS

#: Measures ControlNet++'s published figures for ADE20K, in its authors' format.
DEFAULT_MODEL = 'facebook/mask2former-swin-large-ade-semantic'
#: Gray level of what a label map leaves out.
UNLABELLED = 255


@METRICS.register_module()
class SegmentationMIoU(ControlMetric, SetMetric):
    """Mean over classes of the IoU of their pixels on the generated images and on the samples.

    Pixels are summed over all images of a set before they are divided, as mmsegmentation does and ControlNet++ with it;
    a class that neither side shows does not count. The truth is what the same network finds on the sample's own image,
    or a label map.

    Args:
        model: folder or hub id of a segmentation model of transformers, which is part of the metric's name unless it is
            the default.
        revision: of the hub.
        source: the sample's image that is segmented; None: the truth is the label map `key`, whose gray levels are the
            model's classes and 255 what is not labelled. Resize it with interpolation='nearest'.
        reduce_labels: of a label map: 0 is not labelled and all others are one lower, as ADE20K's own files have it.
        kwargs: see ControlMetric.
    """

    name = 'seg_miou'
    bounds = (0.0, 1.0)

    def __init__(self, model: str = DEFAULT_MODEL, revision: str | None = None, source: str | None = 'img',
                 reduce_labels: bool = False, **kwargs: Any) -> None:
        self.model, self.reduce_labels = NetworkSource(model, '', revision), reduce_labels
        self.name += '' if model == DEFAULT_MODEL else f'_{self.model.label}'
        super().__init__(source=source, **kwargs)

    @cached_property
    def network(self) -> Network:
        """The network, with the head of its kind of model: one class a pixel, or masks with classes (Mask2Former)."""
        from transformers import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING
        universal = type(shared(self.model).config) in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING
        kind = 'Universal' if universal else 'Semantic'
        return shared(self.model._replace(head=f'AutoModelFor{kind}Segmentation'))

    @torch.no_grad()
    def segment(self, image: Image.Image) -> np.ndarray:
        """Return the classes of an image's pixels, int64 [H, W]."""
        processor: Any = self.network.preprocess
        inputs = processor(images=image, return_tensors='pt').to(self.device)
        found = processor.post_process_semantic_segmentation(self.network.on(self.device)(**inputs),
                                                             target_sizes=[(image.height, image.width)])
        return np.asarray(found[0].cpu().numpy())

    def check(self, num_samples: int, num_seeds: int) -> str | None:
        """Find the network's files.

        Raises:
            UserError: names what is missing, or the model does not segment.
        """
        self.network.check()
        return None

    def truth(self, image: Image.Image, sample: str) -> np.ndarray:
        """Return the classes of the sample's pixels, int64 [H, W]; -1 for those that are not labelled.

        Raises:
            UserError: the label map holds colours, or classes that the network does not know.
        """
        if self.extracted:
            return self.segment(image)
        pixels, num_classes = np.asarray(image), self.network.config.num_labels
        levels = pixels[..., 0].astype(np.int64)
        classes = np.where(levels == UNLABELLED, -1, levels - self.reduce_labels)
        if (pixels != pixels[..., :1]).any() or classes.max() >= num_classes:
            held = 'colours' if (pixels != pixels[..., :1]).any() else f'the class {classes.max()}'
            raise UserError(f"SegmentationMIoU: '{self.entry}' of sample '{sample}' holds {held}; the gray levels of a "
                            f"label map are the {num_classes} classes of '{self.network.source}', from 0. With "
                            "source='img' the classes are found on the sample's own image.")
        return classes

    def compare(self, image: Image.Image, truth: np.ndarray) -> np.ndarray:
        """Return pixels of each class, int64 [3, C]: of both, of the image, and of the sample."""
        found, num_classes = self.segment(image), self.network.config.num_labels
        labelled = truth >= 0
        found, truth = found[labelled], truth[labelled]
        return np.stack([np.bincount(classes, minlength=num_classes)
                         for classes in (truth[found == truth], found, truth)])

    def statistic(self, values: Sequence[np.ndarray], rows: Sequence[Measured]) -> float:
        """Return the mean IoU, 0..1."""
        both, found, truth = np.sum(values, axis=0)
        union = found + truth - both
        return float((both[union > 0] / union[union > 0]).mean()) if union.any() else 0.0
