"""Euler, 20 trailing steps from pure noise, classifier-free guidance."""
sampler = dict(
    type='Sampler',
    scheduler=dict(type='EulerDiscreteScheduler'),
    num_inference_steps=20,
    guidances=[dict(type='CFG', scale=3.0)])
