"""A LoRA on the UNet and, at a lower learning rate, on both text encoders."""
_base_ = ['stable_diffusion_xl_lora_text_to_image.py']
model = dict(adapters=dict(style=dict(parts=['unet', 'text_encoder', 'text_encoder_2'])))
optim_wrapper = dict(paramwise_cfg=dict(lr={'style.text_encoder': 5e-6, 'style.text_encoder_2': 5e-6}))
