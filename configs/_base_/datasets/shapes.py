"""Coloured shapes, drawn by code, with outlines as conditioning images; as fusing/fill50k has them."""
# Pixels; data, time ids and sample images follow it.
resolution = 64
# Part of the captions that are replaced by ''.
proportion_empty_prompts = 0.0
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    dataset=dict(
        type='Shapes',
        split='train',
        length=50000,
        seed=0,
        size='$resolution',
        conditioning='outline',
        transforms=[
            dict(type='CaptionDrop', prob='$proportion_empty_prompts'),
            dict(type='ComputeTimeIds'),
            dict(type='PackInputs'),
        ]),
    sampler=dict(type='KeyedSampler', shuffle=True))
