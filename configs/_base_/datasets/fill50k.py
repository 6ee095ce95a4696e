"""fusing/fill50k: 50,000 circles, their outlines as conditioning images, and captions."""
# Pixels; transforms, time ids and sample images follow it.
resolution = 1024
# Part of the captions that are replaced by ''.
proportion_empty_prompts = 0.0
train_dataloader = dict(
    batch_size=1,
    num_workers=2,
    dataset=dict(
        type='HFDataset',
        source='fusing/fill50k',
        split='train',
        image_column='image',
        conditioning_image_column='conditioning_image',
        caption_column='text',
        max_samples=None,
        transforms=[
            dict(type='Resize', size='$resolution', interpolation='bilinear'),
            dict(type='Crop', size='$resolution', mode='center'),
            dict(type='CaptionDrop', prob='$proportion_empty_prompts'),
            dict(type='ComputeTimeIds'),
            dict(type='PackInputs'),
        ]),
    sampler=dict(type='KeyedSampler', shuffle=True))
