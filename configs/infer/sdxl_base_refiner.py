"""An ensemble of expert denoisers: "Base + refiner model" of the pipelines guide."""
_base_ = ['sdxl_text_to_image.py', '../_base_/models/sdxl_refiner.py']
infer_cfg = dict(
    prompt='A majestic lion jumping from a big stone at night', num_inference_steps=40, denoising_end=0.8)
