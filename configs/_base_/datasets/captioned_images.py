"""Captioned images without conditioning images: the leaf names the transform that computes them as `condition`."""
_base_ = ['captions.py']
train_dataloader = dict(dataset=dict(transforms=[
    *_base_.to_size,
    # After the crop: the map is computed once at the size that is trained on, as it will be when sampling.
    '$condition',
    dict(type='CaptionDrop', prob='$proportion_empty_prompts'),
    *_base_.to_inputs,
]))
