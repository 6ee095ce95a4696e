"""Does an image show what its prompt says? CLIP-T, and PickScore, which people's choices have tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from diffengine_sdxl.evaluation.base import MeanMetric
from diffengine_sdxl.evaluation.networks import ImageFeatures, TextFeatures, metric_name, unit
from diffengine_sdxl.registry import METRICS


class TextSimilarity(MeanMetric):
    """A score of image and prompt by a network that reads both; prompts are cut to what it reads (77 tokens of CLIP).

    Attributes:
        kind: name of the metric over `network`; another network's label follows it.
    """

    kind = ''
    network = ''
    needs = ('text',)
    hint = 'It is the prompt: name the column with the captions (caption_column).'

    def __init__(self, model: str, subfolder: str = '', revision: str | None = None, processor: str = '',
                 **kwargs: Any) -> None:
        self.images = ImageFeatures(model, subfolder, revision, processor)
        self.texts = TextFeatures(model, subfolder, revision, processor)
        self.name = metric_name(self.kind, self.images.network.source, self.network)
        super().__init__(**kwargs)

    def check(self, num_samples: int, num_seeds: int) -> str | None:
        """Find the network's files; see `ImageMetric.check`."""
        self.images.check()
        self.texts.check()
        return None

    def measure(self, images: Tensor, batch: Mapping[str, Any]) -> Sequence[float]:
        """Return the cosine of each image with its prompt."""
        return cosines(self.images(images, self.device), self.texts(batch['text'], self.device)).tolist()


def cosines(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of [B, D] with that of another, fp64 [B]."""
    return (unit(features) * unit(others)).sum(axis=1)


@METRICS.register_module()
class CLIPText(TextSimilarity):
    """CLIP-T: mean cosine of the CLIP embeddings of image and prompt. CLIPScore is 100 times that, and 0 below 0.

    The default network is that of torchmetrics' CLIPScore. Its text half is SDXL's first text encoder too, so another
    network is a second opinion.

    Source: Hessel et al., CLIPScore: A Reference-free Evaluation Metric for Image Captioning (2021).

    Args:
        model, subfolder, revision, processor: of a CLIP or SigLIP with text, see `networks.ImageFeatures`.
        kwargs: see ImageMetric.
    """

    kind = 'clip_t'
    network = 'openai/clip-vit-large-patch14'
    bounds = (-1.0, 1.0)

    def __init__(self, model: str = network, subfolder: str = '', revision: str | None = None, processor: str = '',
                 **kwargs: Any) -> None:
        super().__init__(model, subfolder, revision, processor, **kwargs)


@METRICS.register_module()
class PickScore(TextSimilarity):
    """The learned preference of people for an image to a prompt: its CLIP-H's cosine times exp(logit_scale), about 20.

    exp(d) / (1 + exp(d)) is how likely people choose one image rather than another whose score is lower by d.

    Source: Kirstain et al., Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation (2023); the
    score as in the model card of yuvalkirstain/PickScore_v1, which takes tokenizer and image processor of `PROCESSOR`.

    Args:
        model, subfolder, revision: of the network, see `networks.ImageFeatures`.
        processor: folder or hub id of tokenizer and image processor; None: `PROCESSOR` for the default model, else the
            model's own.
        kwargs: see ImageMetric.
    """

    kind = 'pickscore'
    network = 'yuvalkirstain/PickScore_v1'
    bounds = (-np.inf, np.inf)
    PROCESSOR = 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'

    def __init__(self, model: str = network, subfolder: str = '', revision: str | None = None,
                 processor: str | None = None, **kwargs: Any) -> None:
        if processor is None:
            processor = self.PROCESSOR if model == self.network else ''
        super().__init__(model, subfolder, revision, processor, **kwargs)

    def measure(self, images: Tensor, batch: Mapping[str, Any]) -> Sequence[float]:
        """Return the score of each image."""
        return [self.texts.logit_scale * cosine for cosine in super().measure(images, batch)]
