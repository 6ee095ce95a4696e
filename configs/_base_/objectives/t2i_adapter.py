"""The T2I-Adapter recipe: early (noisy) timesteps more often, plain noise, plain squared error."""
objective = dict(
    type='Denoise',
    noise=dict(type='PlainNoise'),
    timesteps=dict(type='CubicTimesteps'),
    weighting=dict(type='NoWeighting'),
    loss=dict(type='L2Loss'))
