"""A T2I-Adapter on the shapes base, from outlines, in about two minutes on two cores: what `make demo` runs."""
_base_ = ['../_base_/recipes/shapes.py', '../_base_/adapters/t2i_adapter.py', '../_base_/objectives/t2i_adapter.py']
model = dict(adapters=dict(adapter=_base_.t2i_adapter), objective=_base_.objective)
# Half of the captions name some attributes only: an outline must not need them, nor add what they leave open.
train_dataloader = dict(dataset=dict(partial_captions=0.5))
train_cfg = dict(max_iters=500)
default_hooks = dict(
    samples=dict(interval=250, num_from_dataset=3, num_images=3, at_start=True), logger=dict(interval=25),
    checkpoint=dict(interval=500))
