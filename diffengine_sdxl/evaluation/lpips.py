"""LPIPS: how far is an image from its sample's own, in features that are weighted as people judge?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffengine_sdxl.errors import one_of
from diffengine_sdxl.evaluation import networks
from diffengine_sdxl.evaluation.pixels import PairMetric
from diffengine_sdxl.evaluation.torchvision_networks import build_lpips
from diffengine_sdxl.registry import METRICS

#: Network -> the side in pixels that images must be larger than; below, a layer has nothing to pool.
NETWORKS = {'alex': 30, 'squeeze': 16, 'vgg': 15}


@METRICS.register_module()
class LPIPS(PairMetric):
    """Learned perceptual distance, version 0.1; 0 of equal images. Needs torchvision (the extra 'metrics').

    Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (2018); torchmetrics.

    Args:
        net: 'alex', which the authors advise for measuring, 'vgg' or 'squeeze'.
        weights: file of torchvision's weights of that network, such as 'alexnet-owt-7be5be79.pth', or a file on the
            hub; None: torchvision downloads it.
        kwargs: see PairMetric.

    Raises:
        UserError: `net` is unknown.
    """

    better, bounds = -1, (0.0, np.inf)

    def __init__(self, net: str = 'alex', weights: str | None = None, **kwargs: Any) -> None:
        one_of('LPIPS: net', net, NETWORKS)
        self.net, self.weights = net, weights
        self.min_side = NETWORKS[net]
        self.name = 'lpips' if net == 'alex' else f'lpips_{net}'
        self._network: Any = None
        super().__init__(**kwargs)

    def check(self, num_samples: int, num_seeds: int) -> str | None:
        """Load the network; see `build_lpips` for what is refused."""
        self._network = self._network or build_lpips(self.net, self.weights)
        return None

    @torch.no_grad()
    def compare(self, images: Tensor, references: Tensor) -> Tensor:
        """Return the distances [B]."""
        self.check(len(images), 1)
        pair = (x.to(self.device) for x in (images, references))
        distances: Tensor = networks.placed(self._network, self.device)(*pair, normalize=True)
        return distances.flatten().cpu()
