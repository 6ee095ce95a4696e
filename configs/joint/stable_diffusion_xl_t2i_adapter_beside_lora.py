"""A T2I-Adapter that trains beside a frozen LoRA: it learns to steer the styled model."""
_base_ = ['../_base_/recipes/t2i_adapter.py', '../_base_/datasets/fill50k.py']
model = dict(adapters=dict(style=dict(type='LoRA', weights='pixel-art-xl-v1.1.safetensors', trainable=False)))
