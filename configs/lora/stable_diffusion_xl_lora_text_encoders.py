"""The same with both text encoders, which learn more slowly."""
_base_ = ['stable_diffusion_xl_lora_text_to_image.py']
model = dict(adapters=dict(style=dict(parts=['unet', 'text_encoder', 'text_encoder_2'])))
optim_wrapper = dict(paramwise_cfg=dict(lr={'style.text_encoder': 5e-6, 'style.text_encoder_2': 5e-6}))
