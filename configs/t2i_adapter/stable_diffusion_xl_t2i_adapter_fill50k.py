_base_ = [
    '../_base_/models/sdxl_base.py', '../_base_/adapters/t2i_adapter.py', '../_base_/objectives/t2i_adapter.py',
    '../_base_/samplers/euler.py', '../_base_/datasets/fill50k.py', '../_base_/schedules/adamw_15k.py',
    '../_base_/runtime.py'
]
model = dict(adapters=dict(adapter=_base_.t2i_adapter), objective=_base_.objective, sampler=_base_.sampler)
