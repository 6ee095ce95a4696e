"""All timesteps alike, plain noise, plain squared error: the recipe of LoRA, IP-Adapter and textual inversion."""
objective = dict(
    type='Denoise',
    noise=dict(type='PlainNoise'),
    timesteps=dict(type='UniformTimesteps'),
    weighting=dict(type='NoWeighting'),
    loss=dict(type='L2Loss'))
