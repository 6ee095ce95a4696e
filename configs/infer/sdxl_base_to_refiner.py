"""The base's finished latents, refined: "Base to refiner model" of the pipelines guide."""
_base_ = ['sdxl_text_to_image.py', '../_base_/models/sdxl_refiner.py']
