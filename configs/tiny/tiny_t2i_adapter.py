"""The main job on a tiny SDXL of random weights and drawn circles, for tests.

It shows that the machinery runs; on random weights nothing can be learned that looks like an image. What learns in
minutes is `shapes_t2i_adapter.py`.
"""
_base_ = ['../t2i_adapter/stable_diffusion_xl_t2i_adapter_fill50k.py']
mixed_precision = 'no'
resolution = 64
# Written by `python -m diffengine_sdxl.testing work_dirs/tiny`.
model = dict(pretrained='work_dirs/tiny/base', vae=None, sampler=dict(num_inference_steps=20))
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(source='work_dirs/tiny/data'))
train_cfg = dict(max_iters=60)
optim_wrapper = dict(accumulative_counts=2, optimizer=dict(lr=1e-3))
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(interval=30),
    samples=dict(interval=30, num_from_dataset=3, num_images=3, at_start=True))
randomness = dict(seed=0)
