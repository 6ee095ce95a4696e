"""What is done to captions: dropped, shuffled, prefixed."""

from typing import Any

import torch

from diffengine_sdxl.datasets.transforms.geometry import draws, probability
from diffengine_sdxl.registry import TRANSFORMS


@TRANSFORMS.register_module()
class CaptionDrop:
    """Replace the caption, with a probability, keyed; `proportion_empty_prompts` of the diffusers scripts.

    Args:
        prob: probability, 0 to 1.
        to: the caption in its place. None keeps the caption and sets drop['text'] instead, for the model to put
            its own null there (as 'zeros').
    """

    def __init__(self, prob: float, to: str | None = '') -> None:
        self.prob, self.to = probability(prob), to

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        drop = float(torch.rand((), generator=draws(sample, 'caption_drop'))) < self.prob
        if self.to is None:
            # Also where it is False: all samples of a batch must have the same entries.
            sample['drop'] = {**sample.get('drop', {}), 'text': drop}
        elif drop:
            sample['text'] = self.to
        return sample


@TRANSFORMS.register_module()
class CaptionShuffle:
    """Put the tags of a caption into another order, keyed; kohya's `shuffle_caption` and `keep_tokens`.

    Args:
        separator: between tags; blanks around them are dropped and one is written after each separator.
        keep: so many tags at the beginning stay where they are.
    """

    def __init__(self, separator: str = ',', keep: int = 0) -> None:
        if not separator or keep < 0:
            raise ValueError(f'separator={separator!r} must not be empty and keep={keep} not negative.')
        self.separator, self.keep = separator, keep

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        tags = [tag for tag in (part.strip() for part in sample['text'].split(self.separator)) if tag]
        kept, others = tags[:self.keep], tags[self.keep:]
        order = torch.randperm(len(others), generator=draws(sample, 'caption_shuffle')).tolist()
        joint = ' ' if self.separator.isspace() else f'{self.separator.strip()} '
        sample['text'] = joint.join([*kept, *[others[i] for i in order]])
        return sample


@TRANSFORMS.register_module()
class CaptionPrefix:
    """Write the same words before every caption, as a trigger word.

    Args:
        prefix: with its blank or comma.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        sample['text'] = self.prefix + sample['text']
        return sample
