"""A textual inversion on SDXL base 1.0: 3,000 steps of four samples, no weight decay."""
_base_ = [
    '../models/sdxl_base.py', '../adapters/textual_inversion.py', '../objectives/denoise.py', '../samplers/euler.py',
    '../schedules/adamw_15k.py', '../evaluation/image_prompt.py', '../runtime.py'
]
model = dict(adapters=dict(word=_base_.textual_inversion), objective=_base_.objective, sampler=_base_.sampler)
train_cfg = dict(max_iters=3000)
optim_wrapper = dict(optimizer=dict(lr=5e-4, weight_decay=0.0))
