"""Where in the picture the loss counts."""

from typing import Any

import torch
from PIL import Image

from diffengine_sdxl.datasets.transforms.geometry import probability
from diffengine_sdxl.datasets.transforms.pack import to_tensor
from diffengine_sdxl.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LossMask:
    """Turn a picture into the weight of each place in the loss: white counts whole, black by `outside`.

    It stands after Resize and Crop, which take the picture along, and before PackInputs. The objective averages it over
    the pixels of each latent; the loss is not divided by it (as `--masked_loss` of sd-scripts).

    Args:
        key: of the picture in the sample (`extra_columns=dict(loss_mask='column')`); it is taken out of it.
        outside: what black counts, 0 to 1.

    Raises:
        ValueError: the sample has no such picture.
    """

    def __init__(self, key: str = 'loss_mask', outside: float = 0.0) -> None:
        self.key, self.outside = key, probability(outside)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        picture = sample.pop(self.key, None)
        if not isinstance(picture, Image.Image):
            raise ValueError(f"Sample '{sample.get('key')}' has no picture '{self.key}' for LossMask: name its column "
                             f"(extra_columns=dict({self.key}='...')), and let LossMask stand before PackInputs.")
        white = to_tensor(picture.convert('L'))[:1]
        sample['mask'] = torch.lerp(torch.tensor(self.outside), torch.tensor(1.0), white)
        return sample
