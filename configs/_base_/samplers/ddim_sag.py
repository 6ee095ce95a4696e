"""DDIM, 50 steps, classifier-free and self-attention guidance: how Refiners samples SDXL."""
sampler = dict(
    type='Sampler',
    scheduler=dict(type='DDIMScheduler', timestep_spacing='leading', steps_offset=1, clip_sample=False,
                   set_alpha_to_one=False),
    num_inference_steps=50,
    guidances=[dict(type='CFG', scale=5.0), dict(type='SAG', scale=0.75)])
