"""Perturbed-attention guidance beside classifier-free guidance: "Text-to-image" of diffusers' PAG guide."""
_base_ = ['sdxl_text_to_image.py']
model = dict(sampler=dict(guidances=[dict(type='CFG', scale=7.0), dict(type='PAG', scale=3.0, layers=['mid'])]))
infer_cfg = dict(prompt='an insect robot preparing a delicious meal, anime style', num_inference_steps=25, seed=0)
