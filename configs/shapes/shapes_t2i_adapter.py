"""A T2I-Adapter on the shapes base, from outlines, in about two minutes on two cores: what `make demo` runs."""
_base_ = ['../_base_/models/shapes.py', '../_base_/adapters/t2i_adapter.py', '../_base_/objectives/t2i_adapter.py',
          '../_base_/samplers/shapes.py', '../_base_/datasets/shapes.py', '../_base_/evaluation/shapes.py',
          '../_base_/schedules/adamw_15k.py', '../_base_/runtime.py']
model = dict(adapters=dict(adapter=_base_.t2i_adapter), objective=_base_.objective, sampler=_base_.sampler)
train_cfg = dict(max_iters=500)
optim_wrapper = dict(accumulative_counts=1, optimizer=dict(lr=1e-3, betas=(0.9, 0.99)))
param_scheduler = dict(name='cosine', num_warmup_steps=20)
default_hooks = dict(
    samples=dict(interval=250, num_from_dataset=3, num_images=3, at_start=True), logger=dict(interval=25),
    checkpoint=dict(interval=500))
randomness = dict(seed=0)
