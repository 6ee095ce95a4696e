"""The refiner behind another base, whose image is `image`: a tip in "Base to refiner model" of the pipelines guide."""
_base_ = ['sdxl_text_to_image.py', '../_base_/pictures.py']
model = dict(pretrained='stabilityai/stable-diffusion-xl-refiner-1.0')
infer_cfg = dict(image=_base_.pictures.astronaut)
