"""Repair a LoRA and a T2I-Adapter: train both, each held to what it does alone, on images of both (docs/partners.md)."""
_base_ = ['stable_diffusion_xl_t2i_adapter_beside_lora.py']
model = dict(adapters=dict(style=dict(trainable=True), adapter=dict(weights='TencentARC/t2i-adapter-sketch-sdxl-1.0')),
             objective=dict(_delete_=True, type='JointDistill'))
train_cfg = dict(max_iters=500)
