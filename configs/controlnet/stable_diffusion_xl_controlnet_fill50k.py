"""A ControlNet from outlines (Zhang et al. 2023, arXiv:2302.05543): a copy of the UNet's half, so 1.2 B parameters train."""
_base_ = [
    '../_base_/models/sdxl_base.py', '../_base_/adapters/controlnet.py', '../_base_/objectives/denoise.py',
    '../_base_/samplers/euler.py', '../_base_/datasets/fill50k.py', '../_base_/schedules/adamw_15k.py',
    '../_base_/runtime.py'
]
model = dict(
    adapters=dict(control=_base_.controlnet), objective=_base_.objective, sampler=_base_.sampler,
    gradient_checkpointing=True)
