"""A ControlNet from outlines (Zhang et al. 2023, arXiv:2302.05543): half of the UNet copied, 1.2 B parameters."""
_base_ = ['../_base_/recipes/controlnet.py', '../_base_/datasets/fill50k.py']
