"""Off-centered: "Crop conditioning" of the pipelines guide."""
_base_ = ['sdxl_text_to_image.py']
infer_cfg = dict(crops_coords_top_left=(256, 0))
