"""A fresh ControlNet: a copy of the base's encoder that adds nothing until it trains."""
controlnet = dict(type='ControlNet', condition_key='conditioning_image', weights=None, scale=1.0)
