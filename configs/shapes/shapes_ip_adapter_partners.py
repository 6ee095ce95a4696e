"""The IP-Adapter of shapes_ip_adapter.py, trained further beside the T2I-Adapter with partners on half of the samples.

Not beside the LoRA: these images have no dots, and the IP-Adapter would learn to remove them.
"""
_base_ = ['../_base_/recipes/shapes_together.py']
model = dict(
    adapters=dict(
        style=None, ip=dict(trainable=True),
        layout=dict(weights='work_dirs/shapes_t2i_adapter_partners/step500/layout')),
    partners=dict(layout=dict(prob=0.5, scale=(0.5, 1.0))),
    objective=dict(timesteps=dict(_delete_=True, type='CubicTimesteps')))
test_cfg = dict(retention=dict(style=None))
train_cfg = dict(max_iters=1500)
default_hooks = dict(samples=None, checkpoint=dict(interval=500, max_keep_ckpts=1))
