"""A fresh LoRA of rank 16 on the UNet's attentions."""
lora = dict(type='LoRA', weights=None, rank=16, alpha=16, scale=1.0)
