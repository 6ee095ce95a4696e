"""What the data sets share: the size, the loaders, and the transforms at both ends; a data set adds its own."""
# Pixels; transforms, time ids and sample images follow it.
resolution = 1024
# What Resize and Crop make of images: pixels, or 'bucket' with a BucketSampler (docs/buckets.md).
image_size = '$resolution'
# The first and last transforms; a data set writes [*_base_.to_size, ..., *_base_.to_inputs].
to_size = [
    dict(type='Resize', size='$image_size', interpolation='bilinear'),
    dict(type='Crop', size='$image_size', mode='center'),
]
to_inputs = [dict(type='ComputeTimeIds'), dict(type='PackInputs')]
train_dataloader = dict(
    # Images of 1024 pixels that go through the UNet at once: 2 for 24 GB, 1 for 12 GB, 4 to 8 for 80 GB; change
    # optim_wrapper.accumulative_counts with it, to keep the samples of a step. With 1 a fast GPU waits for Python.
    batch_size=2,
    num_workers=4,
    dataset=dict(
        type='HFDataset',
        # 1,221 drawings with columns `image` and `text`, the data set of diffusers' own text-to-image guide: enough to
        # see the machinery work, too few for an adapter of use. Name your own here (docs/data.md).
        source='lambdalabs/naruto-blip-captions',
        split='train',
        image_column='image',
        conditioning_image_column=None,
        caption_column='text',
        max_samples=None),
    sampler=dict(type='KeyedSampler', shuffle=True))
# What `diffengine-sdxl test` makes images of: the first rows of the training's data, whose samples the model has seen.
# To hold rows out: docs/configs.md.
test_dataloader = dict(
    batch_size=1,
    num_workers=4,
    dataset='$train_dataloader.dataset',
    sampler=dict(type='FiniteSampler', max_samples=100))
