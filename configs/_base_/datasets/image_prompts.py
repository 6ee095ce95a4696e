"""Captioned images that are their own image prompts: an IP-Adapter learns to make them again; it wants millions."""
_base_ = ['images.py']
# Pixels that the image encoder takes.
image_prompt_size = 224
train_dataloader = dict(dataset=dict(transforms=[
    # Before the geometry: the prompt is the whole image.
    dict(type='ImagePrompt', source='img', key='reference', size='$image_prompt_size'),
    *_base_.to_size,
    dict(type='JointDrop', adapters=['ip'], image=0.05, text=0.05, both=0.05),
    *_base_.to_inputs,
]))
