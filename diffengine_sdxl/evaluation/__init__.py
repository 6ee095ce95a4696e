"""Metrics of the shapes world; `base.py` is their base class, `interval.py` has confidence intervals."""

from . import mask_iou, word_accuracy  # noqa: F401  (fill the registry)
