"""Four steps with SDXL-Lightning's UNet (Lin et al. 2024, arXiv:2402.13929): for SDXL's base, better than its LoRA."""
_base_ = ['sdxl_text_to_image.py']
# Other numbers of steps have other files; that for one step also wants scheduler=dict(prediction_type='sample').
model = dict(
    unet='https://huggingface.co/ByteDance/SDXL-Lightning/blob/main/sdxl_lightning_4step_unet.safetensors',
    sampler=dict(scheduler=dict(timestep_spacing='trailing')))
infer_cfg = dict(prompt='A girl smiling', num_inference_steps=4, guidance_scale=0.0)
