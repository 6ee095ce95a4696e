"""An IP-Adapter on SDXL base 1.0: 100,000 steps of two samples."""
_base_ = [
    '../models/sdxl_base.py', '../adapters/ip_adapter.py', '../objectives/denoise.py', '../samplers/euler.py',
    '../schedules/adamw_15k.py', '../evaluation/image_prompt.py', '../runtime.py'
]
# The recipe drops captions to '', so '' is also what stands for no text when images are made.
model = dict(
    adapters=dict(ip=_base_.ip_adapter), objective=_base_.objective, sampler=_base_.sampler, null_prompt='empty')
train_cfg = dict(max_iters=100000)
optim_wrapper = dict(accumulative_counts=1, optimizer=dict(lr=1e-4))
