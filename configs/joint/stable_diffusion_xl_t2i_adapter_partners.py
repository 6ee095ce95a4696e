"""A T2I-Adapter that learns beside a frozen LoRA on half of the samples; name images of its style (docs/partners.md)."""
_base_ = ['stable_diffusion_xl_t2i_adapter_beside_lora.py']
model = dict(partners=dict(style=dict(prob=0.5, scale=(0.5, 1.0))))
