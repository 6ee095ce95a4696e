"""Inpainting by the base, then by the refiner: the end of "Base to refiner model" of the pipelines guide."""
_base_ = ['sdxl_base_refiner_inpainting.py']
# "Choose a smaller number of inference steps for the refiner": how many, it doesn't say.
infer_cfg = dict(denoising_end=None, refiner=dict(num_inference_steps=30))
