"""Away from small images that were scaled up: "Size conditioning" of the pipelines guide."""
_base_ = ['sdxl_text_to_image.py']
infer_cfg = dict(negative_original_size=(512, 512), negative_target_size=(1024, 1024))
