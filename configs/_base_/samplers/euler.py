"""Euler, 50 steps, classifier-free guidance."""
sampler = dict(
    type='Sampler',
    scheduler=dict(type='EulerDiscreteScheduler'),
    num_inference_steps=50,
    guidances=[dict(type='CFG', scale=5.0)])
