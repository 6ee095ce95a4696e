"""UNet and text encoders of the shapes world, from random weights, on images encoded once: its base's second step.

`diffengine-sdxl cache shapes_pretrain` fills the cache ahead, else the first epoch does (docs/shapes.md).
"""
_base_ = ['../_base_/models/shapes.py', '../_base_/datasets/shapes.py', '../_base_/samplers/shapes.py',
          '../_base_/schedules/adamw_shapes.py', '../_base_/runtime.py']
cache = 'work_dirs/shapes_cache'
model = dict(
    # Random weights of the base's shape; its VAE has been trained already.
    pretrained=None, config='diffengine_sdxl::shapes/base', vae='diffengine_sdxl::shapes/base/vae',
    trainable=['unet', 'text_encoder', 'text_encoder_2'],
    # Shapes are decided on the noisy side of the middle, where places are known and outlines are not.
    objective=dict(type='Denoise', timesteps=dict(type='LogitNormalTimesteps', mean=1.0, std=1.0)),
    sampler=_base_.sampler)
train_dataloader = dict(
    batch_size=32,
    dataset=dict(
        conditioning=None, length=16000, oversize=0.1, variants=1,
        transforms=[
            dict(type='Crop', size='$resolution', mode='random'),
            # Both nulls are learned: the caption '' and zeros, which stock takes for a missing negative prompt.
            dict(type='CaptionDrop', prob=0.05),
            dict(type='CaptionDrop', prob=0.08, to=None),
            dict(type='ComputeTimeIds'),
            dict(type='PackInputs')]))
train_cfg = dict(max_iters=7000)
param_scheduler = dict(num_warmup_steps=200)
default_hooks = dict(
    samples=dict(interval=1000, num_images=6, prompts=[
        'a striped cyan circle on brown', 'a red triangle on white', 'an outlined yellow star on blue',
        'a glossy green square on pink', 'a red star on gray', 'a blue square on orange']),
    logger=dict(interval=50), checkpoint=dict(interval=1000, max_keep_ckpts=2))
custom_hooks = [dict(type='EMAHook', decay=0.999)]
randomness = dict(seed=0)
