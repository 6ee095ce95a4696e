"""Two LoRAs, frozen, at scales of their own: to make images with. The second step of the Refiners guide.

Scales are diffusers': 1.0 is the file as it was trained, alpha / rank included. Refiners leaves alpha out, so a scale
of its is that times rank / alpha here.
"""
_base_ = ['../_base_/models/sdxl_base.py', '../_base_/samplers/euler.py', '../_base_/runtime.py']
resolution = 1024
model = dict(
    adapters=dict(
        scifi=dict(type='LoRA', weights='Sci-fi_Environments_sdxl.safetensors', trainable=False, scale=1.0),
        pixel_art=dict(type='LoRA', weights='pixel-art-xl-v1.1.safetensors', trainable=False, scale=1.4)),
    sampler=_base_.sampler)
