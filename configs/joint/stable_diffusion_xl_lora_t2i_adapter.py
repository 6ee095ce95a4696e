"""A LoRA and a T2I-Adapter, trained together, each at its own learning rate."""
_base_ = [
    '../_base_/models/sdxl_base.py', '../_base_/adapters/lora.py', '../_base_/adapters/t2i_adapter.py',
    '../_base_/objectives/t2i_adapter.py', '../_base_/samplers/euler.py', '../_base_/datasets/fill50k.py',
    '../_base_/schedules/adamw_15k.py', '../_base_/runtime.py'
]
model = dict(
    adapters=dict(style=_base_.lora, adapter=_base_.t2i_adapter), objective=_base_.objective, sampler=_base_.sampler)
optim_wrapper = dict(paramwise_cfg=dict(lr=dict(style=1e-4, adapter=1e-5)))
