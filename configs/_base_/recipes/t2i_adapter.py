"""A T2I-Adapter on SDXL base 1.0: 15,000 steps of four samples, noisy timesteps more often."""
_base_ = [
    '../models/sdxl_base.py', '../adapters/t2i_adapter.py', '../objectives/t2i_adapter.py', '../samplers/euler.py',
    '../schedules/adamw_15k.py', '../evaluation/control.py', '../runtime.py'
]
model = dict(adapters=dict(adapter=_base_.t2i_adapter), objective=_base_.objective, sampler=_base_.sampler)
