"""Metrics, one file each; `base.py` is what those of the shapes world share, `interval.py` how sure a figure is."""

from . import fill_accuracy, ground_accuracy, mask_iou, shape_accuracy, style_score  # noqa: F401  (fill the registry)
