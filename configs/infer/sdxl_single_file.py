"""Base and refiner from one file each: "Load model checkpoints" of the pipelines guide."""
_base_ = ['sdxl_base_refiner.py']
model = dict(
    pretrained='https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/sd_xl_base_1.0.safetensors')
refiner = dict(
    pretrained='https://huggingface.co/stabilityai/stable-diffusion-xl-refiner-1.0/blob/main/'
               'sd_xl_refiner_1.0.safetensors')
