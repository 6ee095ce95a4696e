"""The base of the shapes world on captions that name a part of what is drawn, or nothing."""
_base_ = ['shapes_base.py']
test_dataloader = dict(dataset=dict(partial_captions=1.0))
test_evaluator = [dict(type='CaptionAccuracy'), dict(type='CleanShape')]
