"""One step with SDXL Turbo (Sauer et al. 2023, arXiv:2311.17042), as its model card has it."""
_base_ = ['sdxl_text_to_image.py']
model = dict(
    pretrained='stabilityai/sdxl-turbo',
    sampler=dict(scheduler=dict(type='EulerAncestralDiscreteScheduler', timestep_spacing='trailing')))
infer_cfg = dict(
    prompt='A cinematic shot of a baby racoon wearing an intricate italian priest robe.', height=512, width=512,
    num_inference_steps=1, guidance_scale=0.0)
