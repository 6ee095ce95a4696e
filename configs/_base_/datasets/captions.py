"""Captioned images and nothing besides."""
_base_ = ['images.py']
# Part of the captions that are replaced by ''.
proportion_empty_prompts = 0.0
train_dataloader = dict(dataset=dict(transforms=[
    *_base_.to_size,
    dict(type='CaptionDrop', prob='$proportion_empty_prompts'),
    *_base_.to_inputs,
]))
