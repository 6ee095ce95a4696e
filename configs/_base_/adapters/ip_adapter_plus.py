"""A fresh IP-Adapter plus: 16 tokens from the patches of CLIP ViT-H, by a resampler."""
_base_ = ['ip_adapter.py']
# The authors' weight_name is 'ip-adapter-plus_sdxl_vit-h.safetensors'.
ip_adapter_plus = dict(_base_.ip_adapter, architecture='plus')
