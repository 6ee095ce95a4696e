"""Away from such crops: the second example of "Crop conditioning" of the pipelines guide."""
_base_ = ['sdxl_size_conditioning.py']
infer_cfg = dict(negative_crops_coords_top_left=(0, 0))
