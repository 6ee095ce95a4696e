"""Adapter files as other tools write and read them; the only place where keys are renamed.

detect: which kind of adapter a file or folder is.
lora: which format a LoRA file is of.
kohya: keys of kohya and LyCORIS files, read and written.
layer_names: their names of the UNet's and text encoders' layers.
diffusers_lora: keys of diffusers' files.
peft_lora: keys and configs of peft's folders.
lora_weights: what all of them are read into.
ip_adapter: the authors' files.
t2i_adapter: TencentARC's files.
textual_inversion: learned embeddings.
files: find and open a weight file.
"""
