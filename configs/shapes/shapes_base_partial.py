"""The base of the shapes world on captions that name a part of what is drawn, or nothing."""
_base_ = ['shapes_base.py']
# What captions leave out needs more guidance than whole captions do.
model = dict(sampler=dict(guidances=[dict(type='CFG', scale=2.0)]))
test_dataloader = dict(dataset=dict(partial_captions=1.0))
test_evaluator = [dict(type='CaptionAccuracy'), dict(type='CleanShape')]
