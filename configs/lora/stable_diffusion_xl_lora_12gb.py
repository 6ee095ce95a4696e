"""A LoRA on a GPU of 12 GB: one image of 1024 pixels at a time, and all activations computed again."""
_base_ = ['stable_diffusion_xl_lora_text_to_image.py']
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(accumulative_counts=2)
# Counted for this step by benchmarks/count.py, not measured: 12.2 GiB without checkpointing, of which 5.3 are saved
# activations; 0.5 remain of these.
speed = dict(checkpointing='full')
