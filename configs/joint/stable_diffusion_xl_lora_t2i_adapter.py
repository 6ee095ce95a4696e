"""A LoRA and a T2I-Adapter, trained together, each at its own learning rate."""
_base_ = ['../_base_/recipes/t2i_adapter.py', '../_base_/adapters/lora.py', '../_base_/datasets/fill50k.py']
model = dict(adapters=dict(style=_base_.lora))
optim_wrapper = dict(paramwise_cfg=dict(lr=dict(style=1e-4, adapter=1e-5)))
