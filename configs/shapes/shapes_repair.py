"""Repair three finished adapters that disturb each other: train them together, each held to what it does alone.

Name those of your own with `model.adapters.style.weights` and so on.
"""
_base_ = ['../_base_/recipes/shapes_together.py']
model = dict(
    adapters=dict(style=dict(trainable=True), ip=dict(trainable=True), layout=dict(trainable=True)),
    objective=dict(_delete_=True, type='JointDistill', alone=1.0))
train_dataloader = dict(dataset=dict(styles=['dotted']))
train_cfg = dict(max_iters=400)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
default_hooks = dict(samples=None, logger=dict(interval=25), checkpoint=dict(interval=200, max_keep_ckpts=1))
