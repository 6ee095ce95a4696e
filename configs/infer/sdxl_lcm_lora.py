"""Four steps with LCM-LoRA (Luo et al. 2023, arXiv:2311.05556), "Text-to-image" of diffusers' LCM guide."""
_base_ = ['sdxl_text_to_image.py']
model = dict(
    adapters=dict(lcm=dict(type='LoRA', weights='latent-consistency/lcm-lora-sdxl', trainable=False)),
    sampler=dict(scheduler=dict(type='LCMScheduler')))
# A guidance scale from 1.0 (none) to 2.0.
infer_cfg = dict(
    prompt='Self-portrait oil painting, a beautiful cyborg with golden hair, 8k', num_inference_steps=4,
    guidance_scale=1.0, seed=42)
