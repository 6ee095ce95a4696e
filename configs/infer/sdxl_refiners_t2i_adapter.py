"""And a depth map: "Everything else + T2I-Adapter" of Refiners' guide."""
_base_ = ['sdxl_refiners_ip_adapter.py', '../_base_/adapters/t2i_adapter.py']
model = dict(adapters=dict(depth=dict(
    _base_.t2i_adapter, weights='TencentARC/t2i-adapter-depth-zoe-sdxl-1.0', trainable=False, scale=0.72)))
infer_cfg = dict(conditions=dict(depth=_base_.pictures.castle_depth))
