"""Sampling: one loop over any diffusers scheduler, and the guidances that steer it."""

from . import guidance, sampler, self_attention  # noqa: F401  (fill the registries)
