"""The image encoder of the shapes world, for IP-Adapters to read: the third step of its base (docs/shapes.md)."""
_base_ = ['../_base_/models/shapes.py', '../_base_/datasets/shapes.py', '../_base_/schedules/adamw_shapes.py',
          '../_base_/runtime.py']
model = dict(
    adapters=dict(image_encoder=dict(
        type='ImageEncoder', image_size=64, patch_size=8, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)),
    objective=dict(type='ImageTextContrast', adapter='image_encoder', temperature=0.05))
train_dataloader = dict(batch_size=128, dataset=dict(conditioning=None, combinations='all'))
train_cfg = dict(max_iters=600)
param_scheduler = dict(num_warmup_steps=50)
default_hooks = dict(samples=None, logger=dict(interval=20), checkpoint=dict(interval=600, max_keep_ckpts=1))
randomness = dict(seed=0)
