"""A LoRA that learns one thing from a few images, with prior preservation (Ruiz et al. 2023, arXiv:2208.12242)."""
_base_ = [
    '../_base_/models/sdxl_base.py', '../_base_/adapters/lora.py', '../_base_/objectives/denoise.py',
    '../_base_/samplers/euler.py', '../_base_/datasets/dreambooth.py', '../_base_/schedules/adamw_15k.py',
    '../_base_/runtime.py'
]
model = dict(adapters=dict(thing=_base_.lora), objective=_base_.objective, sampler=_base_.sampler)
train_cfg = dict(max_iters=500)
optim_wrapper = dict(accumulative_counts=1, optimizer=dict(lr=1e-4))
default_hooks = dict(samples=dict(interval=100, prompts=['a photo of sks dog in a bucket'], num_images=4))
