"""An IP-Adapter on the shapes base: the colours of another image, not mentioned in the prompt."""
_base_ = ['../_base_/recipes/shapes.py', '../_base_/adapters/ip_adapter.py', '../_base_/objectives/denoise.py']
model = dict(
    adapters=dict(ip=dict(
        _base_.ip_adapter, image_encoder='diffengine_sdxl::shapes/base', image_encoder_subfolder='image_encoder')),
    objective=_base_.objective)
cache = 'work_dirs/shapes_cache'
# Most captions name some attributes only, and often nothing is left of them: then the image says what to make.
train_dataloader = dict(dataset=dict(conditioning=None, reference=True, partial_captions=0.8, length=10000, transforms=[
    dict(type='ImagePrompt', key='reference', size=64),
    dict(type='JointDrop', adapters=['ip'], image=0.05, text=0.2, both=0.05),
    dict(type='ComputeTimeIds'),
    dict(type='PackInputs'),
]))
# Prompts name the shape only: what fill and ground are right, the image said.
test_dataloader = dict(dataset=dict(conditioning=None, reference=True, mentions=['shape'], transforms=[
    dict(type='ImagePrompt', key='reference', size=64),
    dict(type='ComputeTimeIds'),
    dict(type='PackInputs'),
]))
test_evaluator = [dict(type='FillAccuracy'), dict(type='GroundAccuracy')]
train_cfg = dict(max_iters=4000)
default_hooks = dict(
    samples=dict(interval=2000, num_from_dataset=4, num_images=4),
    checkpoint=dict(interval=2000, max_keep_ckpts=1))
