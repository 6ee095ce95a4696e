"""IP-Adapter plus: 16 tokens, by a resampler that reads the image encoder's patches."""
_base_ = [
    '../_base_/models/sdxl_base.py', '../_base_/adapters/ip_adapter_plus.py', '../_base_/objectives/denoise.py',
    '../_base_/samplers/euler.py', '../_base_/datasets/image_prompts.py', '../_base_/schedules/adamw_15k.py',
    '../_base_/runtime.py'
]
model = dict(
    adapters=dict(ip=_base_.ip_adapter_plus), objective=_base_.objective, sampler=_base_.sampler, null_prompt='empty')
train_cfg = dict(max_iters=100000)
optim_wrapper = dict(accumulative_counts=1, optimizer=dict(lr=1e-4))
