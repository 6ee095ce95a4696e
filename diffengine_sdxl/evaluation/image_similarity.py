"""Does an image show what another one does? CLIP-I and DINO against the sample's own image or its image prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from diffengine_sdxl.evaluation.base import MeanMetric
from diffengine_sdxl.evaluation.networks import ImageFeatures, metric_name, unit
from diffengine_sdxl.evaluation.references import sample_images
from diffengine_sdxl.registry import METRICS


class ImageSimilarity(MeanMetric):
    """Mean cosine of the features of each image with those of an image of its sample.

    Attributes:
        kind: name of the metric over `network`; another network's label follows it.
    """

    kind = ''
    network = ''
    bounds = (-1.0, 1.0)
    hint = "Name the entry with the image to compare with: reference='img', or the key of an image prompt."

    def __init__(self, model: str, subfolder: str = '', revision: str | None = None, reference: str = 'img',
                 **kwargs: Any) -> None:
        self.features = ImageFeatures(model, subfolder, revision)
        self.name = metric_name(self.kind, self.features.network.source, self.network)
        self.key, self.needs = reference, (reference,)
        super().__init__(**kwargs)

    def check(self, num_samples: int, num_seeds: int) -> str | None:
        """Find the network's files; see `ImageMetric.check`."""
        self.features.check()
        return None

    def measure(self, images: Tensor, batch: Mapping[str, Any]) -> Sequence[float]:
        """Return the cosine of each image with that of its sample."""
        # The network remembers the references' features for the other seeds and image sets.
        references = self.features(sample_images(batch, self.key, type(self).__name__), self.device)
        cosines: list[float] = (unit(self.features(images, self.device)) * unit(references)).sum(axis=1).tolist()
        return cosines


@METRICS.register_module()
class CLIPImage(ImageSimilarity):
    """CLIP-I: mean cosine of the CLIP embeddings of two images: the same content and style, less the same place.

    The default network is that of CLIP-T, so that both load one. An IP-Adapter reads its prompts by another CLIP.

    Source: Gal et al., An Image is Worth One Word (2022); Ruiz et al., DreamBooth (2023).

    Args:
        model, subfolder, revision: of the network, see `networks.ImageFeatures`.
        reference: entry of the batch: 'img', the sample's own image, or the key of an image prompt.
        kwargs: see ImageMetric.
    """

    kind = 'clip_i'
    network = 'openai/clip-vit-large-patch14'

    def __init__(self, model: str = network, subfolder: str = '', revision: str | None = None, reference: str = 'img',
                 **kwargs: Any) -> None:
        super().__init__(model, subfolder, revision, reference, **kwargs)


@METRICS.register_module()
class DINO(ImageSimilarity):
    """DINO: mean cosine of the DINO embeddings of two images: the same subject, rather than one of its class.

    The default network is DreamBooth's, ViT-S/16, so that figures compare; 'facebook/dinov2-base' is the better one.

    Source: Ruiz et al., DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation (2023).

    Args:
        model, subfolder, revision, reference, kwargs: see CLIPImage.
    """

    kind = 'dino'
    network = 'facebook/dino-vits16'

    def __init__(self, model: str = network, subfolder: str = '', revision: str | None = None, reference: str = 'img',
                 **kwargs: Any) -> None:
        super().__init__(model, subfolder, revision, reference, **kwargs)
