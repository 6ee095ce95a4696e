"""IP-Adapter: an image as prompt, by 4 tokens of CLIP ViT-H's embedding (Ye et al. 2023, arXiv:2308.06721)."""
_base_ = ['../_base_/recipes/ip_adapter.py', '../_base_/datasets/image_prompts.py']
