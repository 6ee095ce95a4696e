"""A fresh IP-Adapter plus: 16 tokens from the patches of CLIP ViT-H, by a resampler."""
ip_adapter_plus = dict(
    type='IPAdapter',
    architecture='plus',
    condition_key='reference',
    image_encoder='h94/IP-Adapter',
    image_encoder_subfolder='models/image_encoder',
    # To start from the authors': 'h94/IP-Adapter' with subfolder='sdxl_models' and this weight_name.
    weights=None,
    subfolder=None,
    weight_name=None,  # 'ip-adapter-plus_sdxl_vit-h.safetensors'
    scale=1.0)
