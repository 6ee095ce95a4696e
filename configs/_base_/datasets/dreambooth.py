"""DreamBooth: a few images of one thing, and images of its class, so that the model keeps what it knew of it."""
# Pixels; transforms, time ids and sample images follow it.
resolution = 1024
# Folders of images, and the captions of those without a .txt beside them. `sks` is a rare token that names the thing.
instance_folder = 'data/instance'
instance_prompt = 'a photo of sks dog'
class_folder = 'data/class'
class_prompt = 'a photo of dog'
prior_loss_weight = 1.0
folder_transforms = [
    dict(type='Resize', size='$resolution', interpolation='bilinear'),
    dict(type='Crop', size='$resolution', mode='center'),
    dict(type='ComputeTimeIds'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=1,
    num_workers=2,
    dataset=dict(
        type='PriorPreservation',
        instance=dict(type='CaptionFolder', source='$instance_folder', default_caption='$instance_prompt',
                      transforms='$folder_transforms'),
        prior=dict(type='CaptionFolder', source='$class_folder', default_caption='$class_prompt',
                   transforms='$folder_transforms'),
        weight='$prior_loss_weight'),
    sampler=dict(type='KeyedSampler', shuffle=True))
