"""Four steps with SDXL-Lightning's UNet (Lin et al. 2024, arXiv:2402.13929): better than its LoRA, for SDXL's own base."""
_base_ = ['sdxl_text_to_image.py']
# For other numbers of steps there are other files; that for one step also wants scheduler=dict(prediction_type='sample').
model = dict(
    unet='https://huggingface.co/ByteDance/SDXL-Lightning/blob/main/sdxl_lightning_4step_unet.safetensors',
    sampler=dict(scheduler=dict(timestep_spacing='trailing')))
infer_cfg = dict(prompt='A girl smiling', num_inference_steps=4, guidance_scale=0.0)
