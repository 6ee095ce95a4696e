"""Read weights: from folders, single files, the hub, checkpoints and exports; strictly, in safetensors first.

base: the components of a base.
single_file: a whole SDXL in one file.
unet_keys: the original layout's UNet keys.
hub: what is needed of a repository, and the cache.
files: which files of a folder are weights.
strict: from_pretrained without missing or unexpected keys.
checkpoint: step<N>.pth written and read.
trained: find a run's checkpoint or export and load it.
"""
