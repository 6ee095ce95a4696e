"""SDXL's refiner 1.0: it takes over the base's noisy latents, or refines finished ones; two parts are the base's."""
refiner = dict(
    type='SDXL',
    pretrained='stabilityai/stable-diffusion-xl-refiner-1.0',
    shared_components=['text_encoder_2', 'vae'],
    mixed_precision='$mixed_precision')
