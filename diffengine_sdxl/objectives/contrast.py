"""Contrast of images and captions, which trains an image encoder."""

import torch
from torch import Tensor
from torch.nn import functional

from diffengine_sdxl.errors import UserError, did_you_mean
from diffengine_sdxl.protocols import Denoiser
from diffengine_sdxl.registry import OBJECTIVES
from diffengine_sdxl.structures import Batch, send


@OBJECTIVES.register_module()
class ImageTextContrast:
    """CLIP's symmetric cross-entropy between an adapter's image embeddings and the base's pooled text.

    Source: Radford et al. 2021 (CLIP), figure 3, with a fixed temperature and the base's frozen text encoder (Zhai et
    al. 2022, LiT, freeze the image side instead).

    Args:
        adapter: name of the image encoder among the model's adapters.
        temperature: of the softmax.

    Raises:
        UserError: the temperature is not positive.
    """

    def __init__(self, adapter: str = 'image_encoder', temperature: float = 0.05) -> None:
        if temperature <= 0:
            raise UserError(f'ImageTextContrast: temperature={temperature} must be above 0.')
        self.adapter, self.temperature = adapter, temperature

    def __call__(self, model: Denoiser, batch: Batch) -> dict[str, Tensor]:
        """Return {'loss': [], 'accuracy': []}, fp32 (fp64 if the encoder is).

        The accuracy, which is only logged, is the share of images whose own caption is the nearest in the batch.

        Raises:
            UserError: there is no such adapter, or it has no image embeddings.
        """
        encoder = model.adapters[self.adapter] if self.adapter in model.adapters else None  # noqa: SIM401
        if encoder is None or not hasattr(encoder, 'embed'):
            raise UserError(f"ImageTextContrast trains the image encoder '{self.adapter}', but model.adapters holds "
                             f'{", ".join(model.adapters) or "nothing"}.'
                             f'{did_you_mean(self.adapter, list(model.adapters))}')
        images = encoder.embed(batch)
        dtype = torch.promote_types(images.dtype, torch.float32)
        images = functional.normalize(images.to(dtype), dim=-1)
        with torch.no_grad():
            text = functional.normalize(model.encode(batch).pooled.to(dtype), dim=-1)
        logits = images @ text.T / self.temperature
        # A caption that occurs twice in a batch is right for both of its images.
        same = send(torch.tensor([[a == b for b in batch.text] for a in batch.text]), logits.device)
        target = same.to(dtype) / same.sum(dim=1, keepdim=True)
        loss = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
        rows = torch.arange(len(batch), device=logits.device)
        return {'loss': loss, 'accuracy': same[rows, logits.argmax(dim=1)].float().mean()}
