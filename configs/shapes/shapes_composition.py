"""Three adapters, each trained alone, at once: style by LoRA, colours by IP-Adapter, layout by T2I-Adapter.

The test says how much each of them keeps of what it does alone. `--cfg-options model.adapters.ip.scale=1.4` and the like
change one.
"""
_base_ = ['../_base_/recipes/shapes_together.py']
# Nothing trains here; shapes_repair and the configs of partners do.
train_dataloader = train_cfg = optim_wrapper = param_scheduler = None
