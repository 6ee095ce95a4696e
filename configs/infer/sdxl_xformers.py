"""Base and refiner with xFormers' attention: "Optimizations" of the pipelines guide."""
_base_ = ['sdxl_base_refiner.py']
model = dict(attention='xformers')
refiner = dict(attention='xformers')
