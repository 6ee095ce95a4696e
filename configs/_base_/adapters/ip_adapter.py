"""A fresh IP-Adapter: 4 tokens from the embedding of CLIP ViT-H, for which h94/IP-Adapter keeps the encoder."""
ip_adapter = dict(
    type='IPAdapter',
    condition_key='reference',
    image_encoder='h94/IP-Adapter',
    image_encoder_subfolder='models/image_encoder',
    # To start from the authors': 'h94/IP-Adapter' with subfolder='sdxl_models' and this weight_name.
    weights=None,
    subfolder=None,
    weight_name=None,  # 'ip-adapter_sdxl_vit-h.safetensors'
    scale=1.0)
