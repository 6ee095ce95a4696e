"""A LoRA of rank 16 on the UNet's attention, from captioned images."""
_base_ = [
    '../_base_/models/sdxl_base.py', '../_base_/adapters/lora.py', '../_base_/objectives/denoise.py',
    '../_base_/samplers/euler.py', '../_base_/datasets/captions.py', '../_base_/schedules/adamw_15k.py',
    '../_base_/runtime.py'
]
model = dict(adapters=dict(style=_base_.lora), objective=_base_.objective, sampler=_base_.sampler)
train_cfg = dict(max_iters=5000)
optim_wrapper = dict(accumulative_counts=1, optimizer=dict(lr=1e-4))
