"""What diffusers cannot do at once: inpainting, two LoRAs, an IP-Adapter, two T2I-Adapters, SAG and the refiner.

It repaints the castle of Refiners' guide where a mask of the pipelines guide is white.
"""
_base_ = ['sdxl_refiners_t2i_adapter.py', '../_base_/models/sdxl_refiner.py']
model = dict(adapters=dict(
    # It acts in the first half of denoising. Under a name of its own it could read another map than `depth`.
    midas=dict(_base_.t2i_adapter, condition_key='midas', weights='TencentARC/t2i-adapter-depth-midas-sdxl-1.0',
               trainable=False, scale=0.4, active_range=(0.0, 0.5))))
refiner = dict(sampler=dict(_base_.sampler, guidances=[dict(type='CFG', scale=5.0)]))
infer_cfg = dict(
    image=_base_.pictures.castle,
    mask_image=_base_.pictures.bench_mask,
    conditions=dict(midas=_base_.pictures.castle_depth),
    denoising_end=0.8)
