"""Two LoRAs at scales of their own: "Multiple LoRAs" of Refiners' guide."""
_base_ = ['sdxl_refiners_lora.py']
model = dict(adapters=dict(
    pixel_art=dict(type='LoRA', weights='pixel-art-xl-v1.1.safetensors', trainable=False, scale=1.4)))
