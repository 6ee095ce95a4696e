"""The IP-Adapter of shapes_ip_adapter.py, trained beside a finished T2I-Adapter on half of the samples.

Not beside the LoRA: these images have no dots, and the IP-Adapter would learn to remove them.
"""
_base_ = ['../_base_/recipes/shapes_together.py']
model = dict(
    adapters=dict(style=None, ip=dict(weights=None, trainable=True)),
    partners=dict(layout=dict(prob=0.5, scale=(0.5, 1.0))))
train_dataloader = dict(dataset=dict(transforms=[
    dict(type='ImagePrompt', key='reference', size=64),
    dict(type='JointDrop', adapters=['ip'], image=0.05, text=0.3, both=0.05),
    dict(type='ComputeTimeIds'),
    dict(type='PackInputs'),
]))
test_cfg = dict(retention=dict(style=None))
train_cfg = dict(max_iters=4000)
default_hooks = dict(samples=None, checkpoint=dict(interval=2000, max_keep_ckpts=1))
