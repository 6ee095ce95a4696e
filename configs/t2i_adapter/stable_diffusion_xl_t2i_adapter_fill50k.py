"""A T2I-Adapter (Mou et al. 2023, arXiv:2302.08453) from outlines: 50,000 circles of fusing/fill50k."""
_base_ = ['../_base_/recipes/t2i_adapter.py', '../_base_/datasets/fill50k.py']
