"""Are the edges of the generated image those of the sample's own? A leaf may name what its condition asks for."""
# Within a pixel; for any condition that goes with the image. All metrics: docs/metrics.md.
test_evaluator = [dict(type='CannyF1', source='img', extractor=dict(type='Canny', low=100, high=200), tolerance=1)]
test_cfg = dict(type='TestLoop', seeds=1)
