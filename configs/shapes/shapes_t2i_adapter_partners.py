"""The T2I-Adapter of shapes_t2i_adapter.py, trained further beside the finished IP-Adapter on half of the samples.

Not beside the LoRA: these images have no dots, and the T2I-Adapter would learn to remove them.
"""
_base_ = ['../_base_/recipes/shapes_together.py']
model = dict(
    adapters=dict(style=None, layout=dict(trainable=True)),
    partners=dict(ip=dict(prob=0.5, scale=(0.5, 1.0))),
    objective=dict(timesteps=dict(_delete_=True, type='CubicTimesteps')))
test_cfg = dict(retention=dict(style=None))
train_cfg = dict(max_iters=500)
default_hooks = dict(samples=None, checkpoint=dict(interval=500, max_keep_ckpts=1))
