_base_ = [
    '../_base_/models/sdxl_base.py', '../_base_/adapters/t2i_adapter.py', '../_base_/objectives/t2i_adapter.py',
    '../_base_/samplers/euler.py', '../_base_/datasets/captioned_images.py', '../_base_/schedules/adamw_15k.py',
    '../_base_/runtime.py'
]
model = dict(adapters=dict(adapter=_base_.t2i_adapter), objective=_base_.objective, sampler=_base_.sampler)
# White edges on black, computed from each image at `detection_resolution` pixels (None: at `resolution`).
condition = dict(type='Canny', low=100, high=200, detection_resolution=None)
