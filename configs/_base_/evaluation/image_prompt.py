"""Is the image like the sample's own, by CLIP and DINO, and does it show what its caption says."""
test_evaluator = [dict(type='CLIPImage'), dict(type='DINO'), dict(type='CLIPText')]
test_cfg = dict(type='TestLoop', seeds=1)
