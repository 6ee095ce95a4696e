"""A folder of a few images of one thing, all with the caption that holds its new token; mirrored at random."""
_base_ = ['images.py']
train_dataloader = dict(dataset=dict(
    _delete_=True,
    type='CaptionFolder',
    source='data/instance',
    default_caption='a photo of <thing>',
    transforms=[*_base_.to_size, dict(type='Flip', prob=0.5), *_base_.to_inputs]))
