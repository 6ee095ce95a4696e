"""Captioned images that are their own image prompts: an IP-Adapter learns to make them again."""
# Pixels; transforms, time ids and sample images follow it.
resolution = 1024
# Pixels that the image encoder takes.
image_prompt_size = 224
train_dataloader = dict(
    batch_size=1,
    num_workers=2,
    dataset=dict(
        type='HFDataset',
        # Enough to see the machinery work; IP-Adapters are trained on millions. Name your own here (docs/data.md).
        source='lambdalabs/naruto-blip-captions',
        split='train',
        image_column='image',
        conditioning_image_column=None,
        caption_column='text',
        max_samples=None,
        transforms=[
            # Before the geometry: the prompt is the whole image.
            dict(type='ImagePrompt', source='img', key='reference', size='$image_prompt_size'),
            dict(type='Resize', size='$resolution', interpolation='bilinear'),
            dict(type='Crop', size='$resolution', mode='center'),
            dict(type='JointDrop', adapters=['ip'], image=0.05, text=0.05, both=0.05),
            dict(type='ComputeTimeIds'),
            dict(type='PackInputs'),
        ]),
    sampler=dict(type='KeyedSampler', shuffle=True))
