"""Captions: dropped (alone, or together with image prompts), shuffled, prefixed."""

from collections.abc import Sequence
from typing import Any

import torch

from diffengine_sdxl.datasets.transforms.geometry import probability, sample_generator
from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.registry import TRANSFORMS


def _drop_caption(sample: dict[str, Any], dropped: bool, to: str | None) -> None:
    """Replace the caption by `to` if it is dropped; if `to` is None, record in drop['text'] whether it is."""
    if to is None:
        # False too: all samples of a batch must have the same keys.
        sample['drop'] = {**sample.get('drop', {}), 'text': dropped}
    elif dropped:
        sample['text'] = to


@TRANSFORMS.register_module()
class CaptionDrop:
    """Drop the caption with a probability; `proportion_empty_prompts` of the diffusers scripts.

    Args:
        prob: probability, 0 to 1.
        to: the caption in its place. None keeps the caption and sets drop['text'], for the model to use its null
            prompt instead.
    """

    #: `SampleBuilder.without_drops` leaves this transform out.
    drops_conditioning = True

    def __init__(self, prob: float, to: str | None = '') -> None:
        self.prob, self.to = probability(prob), to

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        drawn = float(torch.rand((), generator=sample_generator(sample, 'caption_drop')))
        _drop_caption(sample, drawn < self.prob, self.to)
        return sample


@TRANSFORMS.register_module()
class JointDrop:
    """Drop the image prompt, the caption, both or nothing, by one draw.

    The recipe of the IP-Adapter (Ye et al. 2023, arXiv:2308.06721: 5 % each; `tutorial_train_sdxl.py`), for any
    adapters.

    Args:
        adapters: names of the adapters whose input is dropped with the image; each uses its null instead.
        image, text, both: probabilities, 0 to 1, together at most 1.
        to: as in `CaptionDrop`.

    Raises:
        UserError: a probability is invalid, or they sum to more than 1.
    """

    #: `SampleBuilder.without_drops` leaves this transform out.
    drops_conditioning = True

    def __init__(self, adapters: Sequence[str] | str, image: float = 0.05, text: float = 0.05, both: float = 0.05,
                 to: str | None = '') -> None:
        self.adapters = [adapters] if isinstance(adapters, str) else list(adapters)
        if not self.adapters:
            raise UserError('JointDrop: adapters is empty; name those whose image is dropped.')
        self.image, self.text, self.both = (probability(value, key) for key, value in (
            ('image', image), ('text', text), ('both', both)))
        if image + text + both > 1 + 1e-9:
            raise UserError(f'JointDrop: image={image}, text={text} and both={both} exclude one another, and sum to '
                            f'{image + text + both:g}, more than 1.')
        self.to = to

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        drawn = float(torch.rand((), generator=sample_generator(sample, 'joint_drop')))
        image = drawn < self.image
        both = not image and drawn < self.image + self.both
        text = both or not image and drawn < self.image + self.both + self.text
        sample['drop'] = {**sample.get('drop', {}), **dict.fromkeys(self.adapters, image or both)}
        _drop_caption(sample, text, self.to)
        return sample


@TRANSFORMS.register_module()
class CaptionShuffle:
    """Shuffle the tags of a caption; kohya's `shuffle_caption` and `keep_tokens`.

    Args:
        separator: between tags; spaces around tags are removed, and one is written after each separator.
        keep: how many tags at the beginning stay in place.
    """

    #: `MapDataset.captions` applies this transform.
    changes_caption = True

    def __init__(self, separator: str = ',', keep: int = 0) -> None:
        if not separator:
            raise UserError(f'separator={separator!r} must not be empty.')
        self.separator, self.keep = separator, whole_number('keep', keep, 0)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        tags = [tag for tag in (part.strip() for part in sample['text'].split(self.separator)) if tag]
        fixed, others = tags[:self.keep], tags[self.keep:]
        order = torch.randperm(len(others), generator=sample_generator(sample, 'caption_shuffle')).tolist()
        joint = ' ' if self.separator.isspace() else f'{self.separator.strip()} '
        sample['text'] = joint.join([*fixed, *[others[i] for i in order]])
        return sample


@TRANSFORMS.register_module()
class CaptionPrefix:
    """Put a prefix before every caption, such as a trigger word.

    Args:
        prefix: with its space or comma.
    """

    #: `MapDataset.captions` applies this transform.
    changes_caption = True

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        sample['text'] = self.prefix + sample['text']
        return sample
