"""UNet and text encoders of the shapes world, trained on with captions that leave parts out: its base's fourth step.

Half of the captions name some of the attributes only, one in ten is empty: an adapter that says the rest needs a base that
draws a clean image for 'a star', 'on blue' and ''.
"""
_base_ = ['shapes_pretrain.py']
load_from = 'work_dirs/fine/step1600.pth'
model = dict(objective=dict(timesteps=dict(mean=0.4, std=1.4)))
train_dataloader = dict(dataset=dict(
    length=40000, partial_captions=0.55,
    transforms=[
        dict(type='Crop', size='$resolution', mode='random'),
        dict(type='CaptionDrop', prob=0.07),
        dict(type='CaptionDrop', prob=0.06, to=None),
        dict(type='ComputeTimeIds'),
        dict(type='PackInputs')]))
train_cfg = dict(max_iters=6000)
optim_wrapper = dict(optimizer=dict(lr=7e-4))
default_hooks = dict(
    samples=dict(interval=1500, num_images=6, prompts=[
        'a striped yellow star on blue', 'a star', 'on blue', 'a red circle', '', 'an outlined green square on pink']),
    checkpoint=dict(interval=500, max_keep_ckpts=2))
randomness = dict(seed=2)
