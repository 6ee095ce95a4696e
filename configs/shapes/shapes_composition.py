"""Three adapters, each trained alone, at once: style by LoRA, colours by IP-Adapter, layout by T2I-Adapter; no prompt.

`--cfg-options model.adapters.ip.scale=0` and the like leave one out.
"""
_base_ = ['../_base_/models/shapes.py', '../_base_/adapters/ip_adapter.py',
          '../_base_/adapters/t2i_adapter.py', '../_base_/samplers/shapes.py', '../_base_/evaluation/shapes.py',
          '../_base_/runtime.py']
resolution = 64
model = dict(
    adapters=dict(
        style=dict(type='LoRA', weights='work_dirs/shapes_lora/step3000/style', trainable=False, scale=1.0),
        ip=dict(_base_.ip_adapter, weights='work_dirs/shapes_ip_adapter/step4000/ip', trainable=False, scale=1.0,
                image_encoder='diffengine_sdxl::shapes/base', image_encoder_subfolder='image_encoder'),
        layout=dict(_base_.t2i_adapter, weights='work_dirs/shapes_t2i_adapter/step500/adapter', trainable=False,
                    scale=1.0)),
    sampler=_base_.sampler)
test_dataloader = dict(dataset=dict(styles=['dotted'], reference=True, transforms=[
    dict(type='ImagePrompt', key='reference', size=64),
    dict(type='CaptionDrop', prob=1.0),
    dict(type='ComputeTimeIds'),
    dict(type='PackInputs'),
]))
test_evaluator = [dict(type='StyleScore'), dict(type='FillAccuracy'), dict(type='GroundAccuracy'), dict(type='MaskIoU')]
