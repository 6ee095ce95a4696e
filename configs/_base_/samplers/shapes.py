"""Euler, 20 trailing steps from pure noise, little guidance: so small a world is distorted by more than 2."""
sampler = dict(
    type='Sampler',
    scheduler=dict(type='EulerDiscreteScheduler'),
    num_inference_steps=20,
    guidances=[dict(type='CFG', scale=1.5)])
