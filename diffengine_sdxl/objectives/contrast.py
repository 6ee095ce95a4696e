"""Image and caption close to each other, far from the others of the batch: what trains an image encoder."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffengine_sdxl.registry import OBJECTIVES, nearest
from diffengine_sdxl.structures import Batch


@OBJECTIVES.register_module()
class ImageTextContrast:
    """CLIP's symmetric cross-entropy between an adapter's image embeddings and the base's pooled text.

    Source: Radford et al. 2021 (CLIP), figure 3, with a fixed temperature and a frozen text encoder, which knows the
    words already (as Zhai et al. 2022, LiT, freeze the image side).

    Args:
        adapter: name of the image encoder among the model's adapters.
        temperature: of the softmax.

    Raises:
        ValueError: the temperature is not positive.
    """

    def __init__(self, adapter: str = 'image_encoder', temperature: float = 0.05) -> None:
        if temperature <= 0:
            raise ValueError(f'ImageTextContrast: temperature={temperature} must be above 0.')
        self.adapter, self.temperature = adapter, temperature

    def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """{'loss': [], 'accuracy': []}: fp32 (fp64 if the encoder is), and the share of images whose own caption is the
        nearest in the batch, as logged.

        Raises:
            ValueError: there is no such adapter, or it has no image embeddings.
        """
        encoder = dict(model.adapters.items()).get(self.adapter)
        if encoder is None or not hasattr(encoder, 'embed'):
            raise ValueError(f"ImageTextContrast trains the image encoder '{self.adapter}', but model.adapters holds "
                             f'{", ".join(model.adapters) or "nothing"}.{nearest(self.adapter, list(model.adapters))}')
        images = encoder.embed(batch)
        dtype = torch.promote_types(images.dtype, torch.float32)
        images = functional.normalize(images.to(dtype), dim=-1)
        with torch.no_grad():
            text = functional.normalize(model.encode(batch).pooled.to(dtype), dim=-1)
        logits = images @ text.T / self.temperature
        own = torch.arange(len(batch), device=logits.device)
        # A caption that stands twice in a batch is right for both of its images.
        same = torch.tensor([[a == b for b in batch.text] for a in batch.text], device=logits.device)
        wanted = same.to(dtype) / same.sum(dim=1, keepdim=True)
        loss = (functional.cross_entropy(logits, wanted) + functional.cross_entropy(logits.T, wanted)) / 2
        found = same[own, logits.argmax(dim=1)].float().mean()
        return {'loss': loss, 'accuracy': found}
