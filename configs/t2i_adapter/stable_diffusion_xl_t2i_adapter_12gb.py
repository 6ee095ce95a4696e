"""A T2I-Adapter on a GPU of 12 GB: one image of 1024 pixels at a time, and all activations computed again."""
_base_ = ['stable_diffusion_xl_t2i_adapter_fill50k.py']
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(accumulative_counts=4)
# Counted for this step by benchmarks/count.py, not measured: 12.6 GiB without checkpointing, of which 5.1 are saved
# activations; 0.5 remain of these.
speed = dict(checkpointing='full')
