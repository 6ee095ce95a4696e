"""A new token for one thing, learned from a few images (Gal et al. 2022, arXiv:2208.01618)."""
_base_ = ['../_base_/recipes/textual_inversion.py', '../_base_/datasets/new_token.py']
default_hooks = dict(samples=dict(prompts=['a photo of <thing> on a beach'], num_images=4))
