"""A new token for one thing, learned from a few images (Gal et al. 2022, arXiv:2208.01618)."""
_base_ = [
    '../_base_/models/sdxl_base.py', '../_base_/adapters/textual_inversion.py', '../_base_/objectives/denoise.py',
    '../_base_/samplers/euler.py', '../_base_/datasets/captions.py', '../_base_/schedules/adamw_15k.py',
    '../_base_/runtime.py'
]
model = dict(adapters=dict(word=_base_.textual_inversion), objective=_base_.objective, sampler=_base_.sampler)
train_dataloader = dict(dataset=dict(_delete_=True, type='CaptionFolder', source='data/instance',
                                     default_caption='a photo of <thing>',
                                     transforms=[
                                         dict(type='Resize', size='$resolution', interpolation='bilinear'),
                                         dict(type='Crop', size='$resolution', mode='center'),
                                         dict(type='Flip', prob=0.5),
                                         dict(type='ComputeTimeIds'),
                                         dict(type='PackInputs'),
                                     ]))
train_cfg = dict(max_iters=3000)
optim_wrapper = dict(optimizer=dict(lr=5e-4, weight_decay=0.0))
default_hooks = dict(samples=dict(prompts=['a photo of <thing> on a beach'], num_images=4))
