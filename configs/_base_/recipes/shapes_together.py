"""A style by LoRA, colours by IP-Adapter and a layout by T2I-Adapter at once, on partial captions; all three trained.

The leaf lets one or all of them train further.
"""
_base_ = ['shapes.py', '../adapters/ip_adapter_plus.py', '../adapters/t2i_adapter.py', '../objectives/denoise.py']
model = dict(
    adapters=dict(
        style=dict(type='LoRA', weights='work_dirs/shapes_lora/step4000/style', trainable=False, scale=1.0),
        ip=dict(_base_.ip_adapter_plus, weights='work_dirs/shapes_ip_adapter/step5000/ip', trainable=False,
                image_encoder='diffengine_sdxl::shapes/base', image_encoder_subfolder='image_encoder'),
        layout=dict(_base_.t2i_adapter, weights='work_dirs/shapes_t2i_adapter/step500/adapter', trainable=False)),
    objective=_base_.objective,
    # What prompts leave out needs more guidance than whole captions do.
    sampler=dict(guidances=[dict(type='CFG', scale=2.0)]))
cache = 'work_dirs/shapes_cache'
train_dataloader = dict(dataset=dict(reference=True, partial_captions=0.8, length=10000, transforms=[
    dict(type='ImagePrompt', key='reference', size=64),
    dict(type='JointDrop', adapters=['ip'], image=0.05, text=0.4, both=0.05),
    dict(type='ComputeTimeIds'),
    dict(type='PackInputs'),
]))
# Prompts name the shape only: style, colours and place are what the adapters say.
test_dataloader = dict(dataset=dict(styles=['dotted'], reference=True, mentions=['shape'], transforms=[
    dict(type='ImagePrompt', key='reference', size=64),
    dict(type='ComputeTimeIds'),
    dict(type='PackInputs'),
]))
test_evaluator = [dict(type='StyleScore'), dict(type='FillAccuracy'), dict(type='GroundAccuracy'), dict(type='MaskIoU')]
test_cfg = dict(retention=dict(style='style_score', ip=['fill_accuracy', 'ground_accuracy'], layout='iou'))
