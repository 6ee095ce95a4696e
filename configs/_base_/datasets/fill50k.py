"""fusing/fill50k: 50,000 circles, their outlines as conditioning images, and captions."""
_base_ = ['captions.py']
train_dataloader = dict(dataset=dict(source='fusing/fill50k', conditioning_image_column='conditioning_image'))
