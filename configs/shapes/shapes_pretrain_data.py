"""The images that the base of the shapes world is trained on: what tools/cache.py encodes for shapes_pretrain."""
_base_ = ['../_base_/models/shapes.py', '../_base_/datasets/shapes.py']
model = dict(pretrained=None, config='diffengine_sdxl::shapes/base', vae='diffengine_sdxl::shapes/base/vae')
train_dataloader = dict(
    batch_size=32,
    dataset=dict(
        conditioning=None, length=24000, oversize=0.1,
        transforms=[
            dict(type='Crop', size='$resolution', mode='random'),
            dict(type='ComputeTimeIds'),
            dict(type='PackInputs'),
        ]))
default_scope = 'diffengine_sdxl'
randomness = dict(seed=0)
