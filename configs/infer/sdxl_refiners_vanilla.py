"""SDXL with self-attention guidance, 2048 x 2048: "Prerequisites" of Refiners' guide.

Latents are of 256 x 256 while the time ids stay those of 1024 pixels, as there.
"""
_base_ = ['../_base_/models/sdxl_base.py', '../_base_/samplers/ddim_sag.py']
mixed_precision = 'fp16'
model = dict(dtype=dict(vae='float16'), sampler=_base_.sampler)
infer_cfg = dict(
    prompt='a futuristic castle surrounded by a forest, mountains in the background, best quality, high quality',
    negative_prompt='monochrome, lowres, bad anatomy, worst quality, low quality',
    height=2048,
    width=2048,
    original_size=(1024, 1024),
    target_size=(1024, 1024),
    seed=42)
