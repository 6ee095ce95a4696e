"""DreamBooth: a few images of one thing, and images of its class, so that the model keeps what it knew of it."""
_base_ = ['images.py']
# Folders of images, and the captions of those without a .txt beside them. `sks` is a rare token that names the thing.
instance_folder = 'data/instance'
instance_prompt = 'a photo of sks dog'
class_folder = 'data/class'
class_prompt = 'a photo of dog'
prior_loss_weight = 1.0
folder_transforms = [*_base_.to_size, *_base_.to_inputs]
# A row is a pair: an image of the thing and one of its class.
train_dataloader = dict(batch_size=1, dataset=dict(
    _delete_=True,
    type='PriorPreservation',
    instance=dict(type='CaptionFolder', source='$instance_folder', default_caption='$instance_prompt',
                  transforms='$folder_transforms'),
    prior=dict(type='CaptionFolder', source='$class_folder', default_caption='$class_prompt',
               transforms='$folder_transforms'),
    weight='$prior_loss_weight'))
# Its images of the thing are compared with the generated ones.
test_dataloader = dict(dataset=dict(
    _delete_=True, type='CaptionFolder', source='$instance_folder', default_caption='$instance_prompt',
    transforms='$folder_transforms'))
