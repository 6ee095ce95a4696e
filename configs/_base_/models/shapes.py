"""The tiny SDXL of the shapes world, which came with this package."""
# 'no', 'fp16' or 'bf16': read by the model and the optimizer wrapper.
mixed_precision = 'no'
model = dict(type='SDXL', pretrained='diffengine_sdxl::shapes/base', mixed_precision='$mixed_precision')
