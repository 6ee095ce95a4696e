"""A T2I-Adapter that trains beside a frozen LoRA: it learns to steer the styled model."""
_base_ = ['stable_diffusion_xl_lora_t2i_adapter.py']
model = dict(adapters=dict(
    style=dict(_delete_=True, type='LoRA', weights='pixel-art-xl-v1.1.safetensors', trainable=False)))
optim_wrapper = dict(paramwise_cfg=None)
