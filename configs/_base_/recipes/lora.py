"""A LoRA on SDXL base 1.0: 5,000 steps of two samples."""
_base_ = [
    '../models/sdxl_base.py', '../adapters/lora.py', '../objectives/denoise.py', '../samplers/euler.py',
    '../schedules/adamw_15k.py', '../evaluation/text.py', '../runtime.py'
]
model = dict(adapters=dict(style=_base_.lora), objective=_base_.objective, sampler=_base_.sampler)
train_cfg = dict(max_iters=5000)
optim_wrapper = dict(accumulative_counts=1, optimizer=dict(lr=1e-4))
