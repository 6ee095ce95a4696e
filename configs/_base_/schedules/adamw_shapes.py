"""AdamW on the shapes world: one batch a step, a high learning rate, a cosine; the leaf says how many steps."""
_base_ = ['adamw_15k.py']
optim_wrapper = dict(accumulative_counts=1, optimizer=dict(lr=1e-3, betas=(0.9, 0.99)))
param_scheduler = dict(name='cosine', num_warmup_steps=20)
