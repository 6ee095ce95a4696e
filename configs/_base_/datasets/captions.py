"""Captioned images and nothing besides."""
# Pixels; transforms, time ids and sample images follow it.
resolution = 1024
# Part of the captions that are replaced by ''.
proportion_empty_prompts = 0.0
train_dataloader = dict(
    batch_size=1,
    num_workers=2,
    dataset=dict(
        type='HFDataset',
        # 1,221 drawings with columns `image` and `text`, the data set of diffusers' own text-to-image guide. Name your
        # own here (docs/data.md).
        source='lambdalabs/naruto-blip-captions',
        split='train',
        image_column='image',
        conditioning_image_column=None,
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
