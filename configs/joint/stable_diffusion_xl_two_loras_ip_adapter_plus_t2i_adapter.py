"""Two LoRAs, an IP-Adapter plus and a T2I-Adapter of depth: the last step of the Refiners guide."""
_base_ = ['stable_diffusion_xl_two_loras_ip_adapter_plus.py']
model = dict(adapters=dict(depth=dict(
    type='T2IAdapter', reads='conditioning_image', weights='TencentARC/t2i-adapter-depth-zoe-sdxl-1.0',
    trainable=False, scale=0.72)))
