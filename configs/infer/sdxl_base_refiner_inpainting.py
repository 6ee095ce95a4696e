"""Inpainting by an ensemble of expert denoisers: "Base + refiner model" of the pipelines guide."""
_base_ = ['sdxl_base_refiner.py', '../_base_/pictures.py']
infer_cfg = dict(
    prompt='A majestic tiger sitting on a bench',
    image=_base_.pictures.bench,
    mask_image=_base_.pictures.bench_mask,
    # Size and guidance are those of diffusers' inpainting pipeline; the image is of 512 x 512.
    height=1024,
    width=1024,
    num_inference_steps=75,
    denoising_end=0.7,
    guidance_scale=7.5,
    refiner=dict(guidance_scale=7.5))
