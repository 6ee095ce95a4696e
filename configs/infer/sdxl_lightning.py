"""Four steps with SDXL-Lightning's LoRA (Lin et al. 2024, arXiv:2402.13929), as its model card has them."""
_base_ = ['sdxl_text_to_image.py']
# For other numbers of steps there are other files.
model = dict(
    adapters=dict(lightning=dict(type='LoRA', weights='ByteDance/SDXL-Lightning',
                                 weight_name='sdxl_lightning_4step_lora.safetensors', trainable=False)),
    sampler=dict(scheduler=dict(timestep_spacing='trailing')))
infer_cfg = dict(prompt='A girl smiling', num_inference_steps=4, guidance_scale=0.0)
