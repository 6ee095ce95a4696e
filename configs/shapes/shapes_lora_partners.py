"""The LoRA of shapes_lora.py, trained beside a finished IP-Adapter and T2I-Adapter, each on half of the samples."""
_base_ = ['../_base_/recipes/shapes_together.py', '../_base_/adapters/fine_lora.py']
model = dict(
    adapters=dict(style=dict(_delete_=True, **_base_.fine_lora)),
    partners=dict(ip=dict(prob=0.5, scale=(0.5, 1.0)), layout=dict(prob=0.5, scale=(0.5, 1.0))))
train_dataloader = dict(dataset=dict(styles=['dotted'], partial_captions=0.5))
train_cfg = dict(max_iters=3000)
optim_wrapper = dict(optimizer=dict(lr=5e-3, weight_decay=0.0))
default_hooks = dict(samples=None, checkpoint=dict(interval=1000, max_keep_ckpts=1))
