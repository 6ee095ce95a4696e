"""Does the image show what its caption says, by CLIP."""
test_evaluator = [dict(type='CLIPText')]
test_cfg = dict(type='TestLoop', seeds=1)
