"""Another image from an image: "Image-to-image" of the pipelines guide."""
_base_ = ['sdxl_text_to_image.py', '../_base_/pictures.py']
infer_cfg = dict(
    prompt='a dog catching a frisbee in the jungle', image=_base_.pictures.astronaut, strength=0.8, guidance_scale=10.5)
