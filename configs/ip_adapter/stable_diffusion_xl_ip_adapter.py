"""IP-Adapter: an image as prompt, by 4 tokens of CLIP ViT-H's embedding (Ye et al. 2023, arXiv:2308.06721)."""
_base_ = [
    '../_base_/models/sdxl_base.py', '../_base_/adapters/ip_adapter.py', '../_base_/objectives/denoise.py',
    '../_base_/samplers/euler.py', '../_base_/datasets/image_prompts.py', '../_base_/schedules/adamw_15k.py',
    '../_base_/runtime.py'
]
# The recipe drops captions to '', so '' is also what stands for no text when images are made.
model = dict(adapters=dict(ip=_base_.ip_adapter), objective=_base_.objective, sampler=_base_.sampler, null_prompt='empty')
train_cfg = dict(max_iters=100000)
optim_wrapper = dict(accumulative_counts=1, optimizer=dict(lr=1e-4))
