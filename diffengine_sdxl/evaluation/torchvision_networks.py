"""Networks that only torchvision builds: LPIPS's, and the Inception of published FIDs, with weights from files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffengine_sdxl import rng
from diffengine_sdxl.errors import UserError, first_line, listed
from diffengine_sdxl.evaluation import networks
from diffengine_sdxl.evaluation.libraries import torchmetrics, torchvision
from diffengine_sdxl.loading.single_file import read_tensors, resolve_file

#: Side of the images that Inception sees, in pixels.
INCEPTION_SIZE = 299


def build_lpips(net: str, weights: str | None) -> nn.Module:
    """Return torchmetrics' LPIPS network, with its heads, which torchmetrics ships, on a network of torchvision.

    Args:
        net: 'alex', 'vgg' or 'squeeze'.
        weights: file of torchvision's weights for ImageNet, or a file on the hub; None: torchvision's own download.

    Raises:
        UserError: torchvision cannot be imported, or the weights cannot be found or don't fit.
    """
    vision = torchvision('LPIPS')
    with rng.fork('metric network'):
        built: nn.Module = torchmetrics('functional.image.lpips')._LPIPS(net=net, pnet_rand=True)
    name = {'alex': 'AlexNet_Weights', 'vgg': 'VGG16_Weights', 'squeeze': 'SqueezeNet1_1_Weights'}[net]
    path = _downloaded(getattr(vision.models, name).DEFAULT.url) if weights is None else resolve_file(weights)
    # torchmetrics deals the layers to slices and keeps their numbers: slice2.3.weight is features.3.weight.
    _fill(built.net, path, lambda key: re.sub(r'^slices?\.?\d+\.', 'features.', key))  # type: ignore[arg-type]
    return built.eval().requires_grad_(False)


class InceptionFeatures:
    """The 2048 features of the Inception v3 of 2015 that published FIDs and KIDs are of, built on torchvision's.

    It differs from torchvision's in what its pooling branches do at the border, and in the last block, which takes the
    maximum. Images are resized to 299 x 299 with antialiasing, as in torchmetrics, not as in the first code for
    TensorFlow, which makes a difference of some percent (Parmar et al., On Aliased Resizing, 2022).

    Args:
        weights: file 'pt_inception-2015-12-05-6726825d.pth' (github.com/mseitzer/pytorch-fid/releases), or torch-
            fidelity's of the same network; or a file on the hub.
    """

    label, num_features = 'inception', 2048

    def __init__(self, weights: str) -> None:
        self.weights = weights
        self._net: Any = None

    def check(self) -> None:
        """Load the network.

        Raises:
            UserError: torchvision cannot be imported, or the weights are missing or don't fit.
        """
        if self._net is None:
            vision, path = torchvision('Inception'), resolve_file(self.weights)
            with rng.fork('metric network'):
                net = vision.models.inception_v3(weights=None, init_weights=False, aux_logits=False)
            net.fc = nn.Identity()
            _fill(net, path, lambda key: key)
            for name, block in net.named_children():
                if hasattr(block, 'branch_pool'):
                    _pool_by(block, _max_pool if name == 'Mixed_7c' else _mean_pool)
            self._net = net.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor, device: torch.device) -> np.ndarray:
        """Return the features of images [B, 3, H, W] in [0, 1], fp32 [B, 2048]."""
        self.check()
        levels = images.to(device).mul(255).round()
        resized = F.interpolate(levels, size=(INCEPTION_SIZE, INCEPTION_SIZE), mode='bilinear', antialias=True)
        features: Tensor = networks.placed(self._net, device)((resized - 128) / 128)
        return features.cpu().numpy()


def _pool_by(block: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
    """Give a block's pooling branch its input pooled by `pool`, whatever the block itself pools by."""
    inputs: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    block.branch_pool.register_forward_pre_hook(lambda _, args: (pool(inputs.pop()),))  # type: ignore[union-attr]


def _mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)


def _fill(net: nn.Module, path: Path, key_in_file: Callable[[str], str]) -> None:
    """Load all weights of a network from a file, which may hold more (a classifier).

    Raises:
        UserError: the file cannot be read, or lacks a weight or has one of another shape.
    """
    tensors = read_tensors(path)
    own = {key: value for key, value in net.state_dict().items() if not key.endswith('num_batches_tracked')}
    if wrong := [name for key, value in own.items() if (name := key_in_file(key)) not in tensors
                 or tensors[name].shape != value.shape]:
        raise UserError(f"'{path}' is not of this network: of its {len(own)} weights {len(wrong)} are missing or "
                        f'in other shapes ({listed(wrong, 3)}).')
    net.load_state_dict({key: tensors[key_in_file(key)] for key in own}, strict=False)


def _downloaded(url: str) -> Path:
    """Return torchvision's file at `url`, downloaded to torch's cache unless it is there.

    Raises:
        UserError: it cannot be downloaded.
    """
    path = Path(torch.hub.get_dir(), 'checkpoints', url.rpartition('/')[2])
    try:
        if not path.is_file():
            torch.hub.load_state_dict_from_url(url, map_location='cpu', check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: another hash
        raise UserError(f"'{path.name}' cannot be downloaded from {url} ({first_line(error)[:150]}). Put it at "
                        f"'{path}', or name it with weights=...") from error
    return path
