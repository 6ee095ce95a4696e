"""A ControlNet on SDXL base 1.0: 15,000 steps of four samples; 1.2 B parameters train."""
_base_ = [
    '../models/sdxl_base.py', '../adapters/controlnet.py', '../objectives/denoise.py', '../samplers/euler.py',
    '../schedules/adamw_15k.py', '../evaluation/control.py', '../runtime.py'
]
model = dict(adapters=dict(control=_base_.controlnet), objective=_base_.objective, sampler=_base_.sampler)
