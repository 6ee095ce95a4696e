"""The base of the shapes world as it came with this package: to test (`--checkpoint none`) and to make images with.

`--cfg-options test_dataloader.dataset.combinations=held_out` asks for pairs of fill and shape that it never saw.
"""
_base_ = ['../_base_/models/shapes.py', '../_base_/samplers/shapes.py', '../_base_/evaluation/shapes.py',
          '../_base_/runtime.py']
resolution = 64
model = dict(sampler=_base_.sampler)
infer_cfg = dict(prompt='a blue star on white')
