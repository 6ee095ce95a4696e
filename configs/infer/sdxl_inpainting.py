"""A part of an image made anew: "Inpainting" of the pipelines guide."""
_base_ = ['sdxl_text_to_image.py', '../_base_/pictures.py']
infer_cfg = dict(
    prompt='A deep sea diver floating',
    image=_base_.pictures.astronaut,
    mask_image=_base_.pictures.astronaut_mask,
    # What diffusers' inpainting pipeline makes, whatever the image's size.
    height=1024,
    width=1024,
    strength=0.85,
    guidance_scale=12.5)
