"""Inpainting by a UNet that sees mask and image beside the latents, as its model card has it."""
_base_ = ['sdxl_text_to_image.py', '../_base_/pictures.py']
model = dict(pretrained='diffusers/stable-diffusion-xl-1.0-inpainting-0.1')
infer_cfg = dict(
    prompt='a tiger sitting on a park bench',
    image=_base_.pictures.bench,
    mask_image=_base_.pictures.bench_mask,
    height=1024,
    width=1024,
    num_inference_steps=20,
    # Below 1.0, says the card.
    strength=0.99,
    guidance_scale=8.0,
    seed=0)
