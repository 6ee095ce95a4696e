"""The VAE of the shapes world, from random weights: the first step of its base (docs/shapes.md)."""
_base_ = ['../_base_/models/shapes.py', '../_base_/datasets/shapes.py', '../_base_/schedules/adamw_shapes.py',
          '../_base_/runtime.py']
model = dict(
    pretrained=None, config='diffengine_sdxl::shapes/base', trainable=['vae'],
    objective=dict(type='Reconstruct', kl_weight=1e-7))
# Withheld styles too: what the VAE cannot draw, no adapter could learn.
train_dataloader = dict(
    batch_size=16,
    dataset=dict(conditioning=None, styles=['flat', 'outlined', 'striped', 'glossy', 'dotted', 'ringed'],
                 combinations='all'))
train_cfg = dict(max_iters=2400)
optim_wrapper = dict(optimizer=dict(lr=1.2e-3, weight_decay=0.0))
param_scheduler = dict(num_warmup_steps=100)
default_hooks = dict(samples=None, logger=dict(interval=50), checkpoint=dict(interval=500, max_keep_ckpts=2))
custom_hooks = [dict(type='EMAHook', decay=0.998)]
randomness = dict(seed=0)
