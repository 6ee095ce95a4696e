"""An adapter on the shapes base, trained and tested on that world; the leaf adds the adapter and the objective."""
_base_ = [
    '../models/shapes.py', '../samplers/shapes.py', '../datasets/shapes.py', '../evaluation/shapes.py',
    '../schedules/adamw_shapes.py', '../runtime.py'
]
model = dict(sampler=_base_.sampler)
default_hooks = dict(logger=dict(interval=50))
randomness = dict(seed=0)
