"""IP-Adapter plus: 16 tokens, by a resampler that reads the image encoder's patches."""
_base_ = ['../_base_/recipes/ip_adapter_plus.py', '../_base_/datasets/image_prompts.py']
