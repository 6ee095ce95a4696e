"""The adapter that stable_diffusion_xl_t2i_adapter_fill50k trains: the inference of diffusers' T2I-Adapter guide."""
# The guide also enables xFormers' attention: `--cfg-options model.attention=xformers`, with the extra `xformers`.
_base_ = ['sdxl_text_to_image.py', '../_base_/adapters/t2i_adapter.py', '../_base_/pictures.py']
model = dict(
    adapters=dict(adapter=dict(
        _base_.t2i_adapter, trainable=False,
        weights='work_dirs/stable_diffusion_xl_t2i_adapter_fill50k/step15000/adapter')),
    sampler=dict(scheduler=dict(type='EulerAncestralDiscreteScheduler')))
infer_cfg = dict(
    prompt='pale golden rod circle with old lace background', conditions=dict(adapter=_base_.pictures.outline), seed=0,
    offload=True)
