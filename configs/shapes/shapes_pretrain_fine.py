"""UNet and text encoders of the shapes world, trained on with all timesteps alike, from shapes_pretrain's weights.

Detail is decided where noise is low (docs/shapes.md).
"""
_base_ = ['shapes_pretrain.py']
load_from = 'work_dirs/pretrain/step7000.pth'
model = dict(objective=dict(timesteps=dict(_delete_=True, type='UniformTimesteps')))
train_cfg = dict(max_iters=1600)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = dict(num_warmup_steps=50)
default_hooks = dict(samples=dict(interval=800), checkpoint=dict(interval=800))
randomness = dict(seed=1)
