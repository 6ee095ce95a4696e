"""The decoder alone of the shapes base's VAE, trained on: latents stay what the UNet knows (docs/shapes.md)."""
_base_ = ['shapes_vae.py']
model = dict(vae='diffengine_sdxl::shapes/base/vae', objective=dict(decoder_only=True))
train_cfg = dict(max_iters=500)
optim_wrapper = dict(optimizer=dict(lr=4e-4))
randomness = dict(seed=1)
