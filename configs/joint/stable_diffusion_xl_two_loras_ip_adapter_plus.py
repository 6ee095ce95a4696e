"""Two LoRAs and an IP-Adapter plus: the third step of the Refiners guide."""
_base_ = ['stable_diffusion_xl_two_loras.py']
model = dict(adapters=dict(
    scifi=dict(scale=1.5), pixel_art=dict(scale=1.55),
    ip=dict(type='IPAdapter', variant='plus', reads='reference', weights='h94/IP-Adapter', subfolder='sdxl_models',
            weight_name='ip-adapter-plus_sdxl_vit-h.safetensors', trainable=False, scale=1.0)))
