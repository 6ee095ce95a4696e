"""LoRAs and an image prompt, 1024 x 1024 from here on: "Multiple LoRAs + IP-Adapter" of Refiners' guide."""
_base_ = ['sdxl_refiners_two_loras.py', '../_base_/adapters/ip_adapter_plus.py', '../_base_/pictures.py']
model = dict(adapters=dict(
    scifi=dict(scale=1.5), pixel_art=dict(scale=1.55),
    ip=dict(_base_.ip_adapter_plus, weights='h94/IP-Adapter', subfolder='sdxl_models',
            weight_name='ip-adapter-plus_sdxl_vit-h.safetensors', trainable=False)))
infer_cfg = dict(height=1024, width=1024, conditions=dict(ip=_base_.pictures.castle))
