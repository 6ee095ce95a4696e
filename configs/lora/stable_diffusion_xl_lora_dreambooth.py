"""A LoRA that learns one thing from a few images, with prior preservation (Ruiz et al. 2023, arXiv:2208.12242)."""
_base_ = ['../_base_/recipes/lora.py', '../_base_/datasets/dreambooth.py']
model = dict(adapters=dict(_delete_=True, thing=_base_.lora))
train_cfg = dict(max_iters=500)
default_hooks = dict(samples=dict(interval=100, prompts=['a photo of sks dog in a bucket'], num_images=4))
test_evaluator = [dict(type='CLIPImage'), dict(type='DINO'), dict(type='CLIPText')]
