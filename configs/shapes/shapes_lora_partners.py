"""The LoRA of shapes_lora.py, trained further beside the two others with partners, each on half of the samples."""
_base_ = ['../_base_/recipes/shapes_together.py']
model = dict(
    adapters=dict(
        style=dict(trainable=True),
        ip=dict(weights='work_dirs/shapes_ip_adapter_partners/step1500/ip'),
        layout=dict(weights='work_dirs/shapes_t2i_adapter_partners/step500/layout')),
    partners=dict(ip=dict(prob=0.5, scale=(0.5, 1.0)), layout=dict(prob=0.5, scale=(0.5, 1.0))))
train_dataloader = dict(dataset=dict(styles=['dotted']))
train_cfg = dict(max_iters=1500)
optim_wrapper = dict(optimizer=dict(lr=3e-3, weight_decay=0.0))
default_hooks = dict(samples=None, checkpoint=dict(interval=500, max_keep_ckpts=1))
