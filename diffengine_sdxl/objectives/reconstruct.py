"""Reconstruction, which trains a VAE."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffengine_sdxl.errors import UserError, one_of
from diffengine_sdxl.noise_schedule import NoiseSchedule
from diffengine_sdxl.objectives.noises import vae_noise
from diffengine_sdxl.protocols import Denoiser
from diffengine_sdxl.registry import OBJECTIVES
from diffengine_sdxl.rng import Draws
from diffengine_sdxl.structures import Batch

#: Prefixes of the names of an AutoencoderKL's weights.
ENCODER, DECODER = ('encoder.', 'quant_conv.'), ('decoder.', 'post_quant_conv.')


@OBJECTIVES.register_module()
class Reconstruct:
    """|decode(z) - x|^p + kl_weight * KL(q(z | x) || N(0, 1)), z drawn from q(z | x).

    Source: Kingma & Welling 2014; the small weight of the KL and its sum over a latent's elements as in Rombach et
    al. 2022 (latent diffusion), without their perceptual and adversarial parts. The sample's noise is a keyed draw.

    Args:
        kl_weight: of the KL, which is summed over a sample's latent and averaged over the batch.
        power: p, 2 (which PSNR measures) or 1.
        decoder_only: freeze the encoder, and so the latents that the UNet sees; there is no KL then.

    Raises:
        UserError: a number is out of range.
    """

    def __init__(self, kl_weight: float = 1e-6, power: int = 2, decoder_only: bool = False) -> None:
        if kl_weight < 0:
            raise UserError(f'Reconstruct: kl_weight={kl_weight} must not be negative.')
        one_of('Reconstruct: power', power, (1, 2))
        self.kl_weight, self.power, self.decoder_only = kl_weight, power, decoder_only
        #: Prefixes of the VAE's weights that get a gradient.
        self.vae_parts = DECODER if decoder_only else (*ENCODER, *DECODER)

    def draw(self, draws: Draws, shape: Sequence[int], schedule: NoiseSchedule,
             encodes: bool = False) -> dict[str, Tensor]:
        """Return the VAE's noise, 'vae' [B, *shape], of samples that the model encodes; fp32 on the CPU."""
        return {'vae': draws.normal('vae', shape)} if encodes else {}

    def __call__(self, model: Denoiser, batch: Batch) -> dict[str, Tensor]:
        """Return {'loss_reconstruction': [], 'loss_kl': [] (with the encoder), 'psnr': []}: means over the batch.

        PSNR is in dB and only logged. fp32, or fp64 if the VAE is.

        Raises:
            UserError: the VAE does not train, something else does, or the batch has no image.
        """
        if set(model.trainable_parts) != {'vae'} or len(model.trainables()) > 1:
            raise UserError(f'Reconstruct trains the VAE alone, but model.trainable is {list(model.trainable_parts)} '
                             f"and {', '.join(model.trainables()) or 'nothing'} would train; set trainable=['vae'] and "
                             'remove the adapters.')
        if batch.img is None:
            raise UserError("The samples have no 'img', which Reconstruct needs; a VAE cannot learn from cached "
                            'latents.')
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.decoder_only):
            posterior = model.posterior(batch)
        latents = posterior.mean + posterior.std * vae_noise(batch, posterior.mean)
        decoded = model.vae.decode(latents, return_dict=False)[0]
        dtype = torch.promote_types(decoded.dtype, torch.float32)
        error = decoded.to(dtype) - batch.img
        with torch.no_grad():  # the peak of images in [-1, 1] is 2
            psnr = (10 * torch.log10(4 / error.square().mean(dim=(1, 2, 3)).clamp_min(1e-12))).mean()
        losses = {'loss_reconstruction': error.abs().pow(self.power).mean()}
        if not self.decoder_only:
            losses['loss_kl'] = self.kl_weight * posterior.kl().to(dtype).mean()
        return {**losses, 'psnr': psnr}
