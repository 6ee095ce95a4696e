"""An IP-Adapter on the shapes base: the colours of another image, not mentioned in the prompt."""
_base_ = ['../_base_/recipes/shapes.py', '../_base_/adapters/ip_adapter.py', '../_base_/objectives/denoise.py']
model = dict(
    adapters=dict(ip=dict(
        _base_.ip_adapter, image_encoder='diffengine_sdxl::shapes/base', image_encoder_subfolder='image_encoder')),
    objective=_base_.objective)
train_dataloader = dict(dataset=dict(conditioning=None, reference=True, transforms=[
    dict(type='ImagePrompt', key='reference', size=64),
    # Text far more often than in the recipe: half of the time the image alone says what to make.
    dict(type='JointDrop', adapters=['ip'], image=0.05, text=0.5, both=0.05),
    dict(type='ComputeTimeIds'),
    dict(type='PackInputs'),
]))
# Empty prompts: what fill and ground are right, the image said.
test_dataloader = dict(dataset=dict(conditioning=None, reference=True, transforms=[
    dict(type='ImagePrompt', key='reference', size=64),
    dict(type='CaptionDrop', prob=1.0),
    dict(type='ComputeTimeIds'),
    dict(type='PackInputs'),
]))
test_evaluator = [dict(type='FillAccuracy'), dict(type='GroundAccuracy')]
train_cfg = dict(max_iters=4000)
default_hooks = dict(
    samples=dict(interval=2000, num_from_dataset=4, num_images=4),
    checkpoint=dict(interval=2000, max_keep_ckpts=1))
