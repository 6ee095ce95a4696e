"""SDXL base, classifier-free guidance: "Text-to-image" of the pipelines guide; its other sections build on this."""
_base_ = ['../_base_/models/sdxl_base.py', '../_base_/samplers/euler.py']
mixed_precision = 'fp16'
# The base's own VAE, which stays in fp32.
model = dict(vae=None, sampler=_base_.sampler)
infer_cfg = dict(prompt='Astronaut in a jungle, cold color palette, muted colors, detailed, 8k')
