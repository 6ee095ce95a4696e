"""Image prompts and captions, dropped by one draw, so that no sample loses both by accident."""

from collections.abc import Sequence
from typing import Any

import torch

from diffengine_sdxl.datasets.transforms.geometry import draws, probability
from diffengine_sdxl.registry import TRANSFORMS


@TRANSFORMS.register_module()
class JointDrop:
    """Of each sample drop the image, or the text, or both, or nothing: exclusive, keyed, one draw.

    The recipe of the IP-Adapter (Ye et al. 2023, arXiv:2308.06721: 5 % each; `tutorial_train_sdxl.py`), for any
    adapters.

    Args:
        adapters: names of the adapters whose input is dropped where the image is: each puts its own null there.
        image, text, both: probabilities, 0 to 1, together at most 1.
        to: the caption in place of a dropped one. None keeps the caption and sets drop['text'] instead, for the model
            to put its own null there (as 'zeros').

    Raises:
        ValueError: a probability is none, or they sum to more than 1.
    """

    def __init__(self, adapters: Sequence[str] | str, image: float = 0.05, text: float = 0.05, both: float = 0.05,
                 to: str | None = '') -> None:
        self.adapters = [adapters] if isinstance(adapters, str) else list(adapters)
        if not self.adapters:
            raise ValueError('JointDrop: adapters is empty; name those whose image is dropped.')
        self.image, self.text, self.both = probability(image), probability(text), probability(both)
        if self.image + self.text + self.both > 1 + 1e-9:
            raise ValueError(f'JointDrop: image={image}, text={text} and both={both} exclude one another, and sum to '
                             f'{image + text + both:g}, more than 1.')
        self.to = to

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        drawn = float(torch.rand((), generator=draws(sample, 'joint_drop')))
        image = drawn < self.image
        both = not image and drawn < self.image + self.both
        text = both or not image and drawn < self.image + self.both + self.text
        # Also where nothing is dropped: all samples of a batch must have the same entries.
        drop = dict.fromkeys(self.adapters, image or both)
        if self.to is None:
            drop['text'] = text
        elif text:
            sample['text'] = self.to
        sample['drop'] = {**sample.get('drop', {}), **drop}
        return sample
