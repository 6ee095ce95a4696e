"""Metrics of generated images; `base.py` has their base classes, `interval.py` confidence intervals."""

from . import (  # noqa: F401  (fill the registry)
    control_maps,
    control_pose,
    control_segmentation,
    distribution,
    image_similarity,
    lpips,
    mask_iou,
    memorisation,
    pixels,
    seed_diversity,
    text_similarity,
    word_accuracy,
)
