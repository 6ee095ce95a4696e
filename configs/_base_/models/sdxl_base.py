"""SDXL base 1.0 with a VAE that does not overflow in fp16."""
# 'no', 'fp16' or 'bf16': read by the model and the optimizer wrapper.
mixed_precision = 'bf16'
model = dict(
    type='SDXL',
    pretrained='stabilityai/stable-diffusion-xl-base-1.0',
    vae='madebyollin/sdxl-vae-fp16-fix',
    revision=None,
    variant=None,
    mixed_precision='$mixed_precision',
    gradient_checkpointing=False,
    attention='sdpa')
