"""Four steps with a UNet that was distilled to a latent consistency model: "Text-to-image" of diffusers' LCM guide."""
_base_ = ['sdxl_text_to_image.py']
model = dict(unet='latent-consistency/lcm-sdxl', sampler=dict(scheduler=dict(type='LCMScheduler')))
infer_cfg = dict(
    prompt='Self-portrait oil painting, a beautiful cyborg with golden hair, 8k', num_inference_steps=4,
    # It reads its guidance scale, from 3 to 13, in the same pass; negative prompts do nothing.
    guidance_scale=8.0, seed=0)
