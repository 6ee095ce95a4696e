"""A LoRA of rank 16 on the UNet's attention, from captioned images."""
_base_ = ['../_base_/recipes/lora.py', '../_base_/datasets/captions.py']
