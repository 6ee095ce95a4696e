"""An IP-Adapter on the shapes base: the colours of another image, not mentioned in the prompt."""
_base_ = ['../_base_/recipes/shapes.py', '../_base_/adapters/ip_adapter_plus.py', '../_base_/objectives/t2i_adapter.py']
model = dict(
    adapters=dict(ip=dict(
        _base_.ip_adapter_plus, image_encoder='diffengine_sdxl::shapes/base', image_encoder_subfolder='image_encoder')),
    objective=_base_.objective,  # noisy timesteps more often: they decide the colours
    sampler=dict(guidances=[dict(type='CFG', scale=2.0)]))
cache = 'work_dirs/shapes_cache'
# Most captions name some attributes only, and often nothing is left of them: then the image says what to make.
train_dataloader = dict(dataset=dict(conditioning=None, reference=True, partial_captions=0.8, length=10000, transforms=[
    dict(type='ImagePrompt', key='reference', size=64),
    dict(type='JointDrop', adapters=['ip'], image=0.05, text=0.4, both=0.05),
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
train_cfg = dict(max_iters=5000)
param_scheduler = dict(num_warmup_steps=100)
default_hooks = dict(
    samples=dict(interval=2000, num_from_dataset=4, num_images=4),
    checkpoint=dict(interval=2000, max_keep_ckpts=1))
