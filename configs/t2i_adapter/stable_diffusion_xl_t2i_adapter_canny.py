"""A T2I-Adapter from Canny edges, computed from the images: white on black."""
_base_ = ['../_base_/recipes/t2i_adapter.py', '../_base_/datasets/captioned_images.py']
# Edges are looked for at `detection_resolution` pixels (None: at `resolution`).
condition = dict(type='Canny', low=100, high=200, detection_resolution=None)
test_evaluator = [dict(type='CannyF1', extractor='$condition')]
