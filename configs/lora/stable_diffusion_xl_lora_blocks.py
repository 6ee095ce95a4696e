"""Rank and learning rate by block: what an image shows and how it is painted are learned in two blocks.

Frenkel et al. 2024, B-LoRA, arXiv:2403.14572: the first and second attention of the first up block.
"""
_base_ = ['stable_diffusion_xl_lora_text_to_image.py']
model = dict(adapters=dict(style=dict(
    targets=['unet.up_blocks.0.attentions.[01].*.attn?.to_?', 'unet.up_blocks.0.attentions.[01].*.attn?.to_out.0'],
    blocks={'unet.up_blocks.0.attentions.0': dict(rank=64), 'unet.up_blocks.0.attentions.1': dict(rank=32)})))
optim_wrapper = dict(paramwise_cfg=dict(lr={'style.unet.up_blocks.0.attentions.0': 5e-5}))
