"""What the metrics of the shapes world share: what a batch must hold, one measurement a picture, and the numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from torch import Tensor

from diffengine_sdxl.evaluation import interval
from diffengine_sdxl.pictures import to_pil
from diffengine_sdxl.registry import nearest
from diffengine_sdxl.shapes.measure import Observation, observe

#: Pictures whose measurement is kept: more than a batch makes in all its variants.
KEPT = 512
_seen: OrderedDict[bytes, Observation] = OrderedDict()


def observed(picture: Tensor) -> Observation:
    """What a picture [3, H, W] in [0, 1] shows; equal pictures are measured once, whichever metric asks."""
    pixels = np.array(to_pil(picture.detach().float().cpu().numpy()))
    key = blake2b(f'{pixels.shape}'.encode() + pixels.tobytes(), digest_size=16).digest()
    if key not in _seen:
        _seen[key] = observe(pixels)
        while len(_seen) > KEPT:
            _seen.popitem(last=False)
    return _seen[key]


class ShapesMetric(BaseMetric):
    """A figure of 0 to 1 for every picture, averaged by variant.

    Computes '<variant>/<name>' and beside it '.../low' and '.../high', its 95 % interval, and '.../num_samples'; see
    `interval`. Pictures of one 'key' are one cluster.

    Args:
        collect_device, prefix, collect_dir: see mmengine's BaseMetric; a `prefix` keeps two metrics of one type apart.
    """

    name = ''
    #: What a batch must hold for `score`, beside 'key'.
    needs: tuple[str, ...] = ()

    def __init__(self, collect_device: str = 'cpu', prefix: str | None = None, collect_dir: str | None = None) -> None:
        # mmengine warns of a metric without prefix; ours need none, since the name stands after the variant.
        super().__init__(collect_device, prefix or self.name, collect_dir)
        self.prefix = prefix

    @abstractmethod
    def score(self, picture: Tensor, sample: Mapping[str, Any]) -> float:
        """How right a picture [3, H, W] is, 0..1.

        Args:
            sample: 'key' and what the metric needs, of the sample that the picture was made for.
        """

    @staticmethod
    def estimate(values: Sequence[float], clusters: Sequence[str]) -> interval.Estimate:
        """Mean and interval, for scores of 0 and 1."""
        return interval.share(values, clusters)

    def process(self, data_batch: Mapping[str, Any], data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Score all pictures of a batch.

        Args:
            data_batch: as collated: 'key' and what the metric needs, B of each.
            data_samples: B dicts of 'key' and 'images', {variant: [3, H, W] in [0, 1]}.

        Raises:
            ValueError: the batch lacks what the metric needs, or it or a picture cannot be used.
        """
        for name in ('key', *self.needs):
            if name not in data_batch:
                raise ValueError(f"{type(self).__name__} needs '{name}' of every sample, and the batch has none; the "
                                 "data set 'Shapes' gives it with truth=True.")
        keys = list(data_batch['key'])
        assert keys == [made['key'] for made in data_samples], 'the pictures of a batch, in its order'
        for i, made in enumerate(data_samples):
            sample = {name: data_batch[name][i] for name in ('key', *self.needs)}
            for variant, picture in made['images'].items():
                if not bool(picture.isfinite().all()):
                    raise ValueError(f"The picture '{variant}' of sample '{made['key']}' is not finite, so nothing can "
                                     'be measured in it; the model has diverged, or overflows in its dtype.')
            self.results.append({'key': str(made['key']), 'scores': {
                variant: float(self.score(picture, sample)) for variant, picture in made['images'].items()}})

    def compute_metrics(self, results: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
        """Means with intervals of what `process` found in all processes."""
        numbers: dict[str, float | int] = {}
        for variant in dict.fromkeys(name for result in results for name in result['scores']):
            kept = [result for result in results if variant in result['scores']]
            found = self.estimate([result['scores'][variant] for result in kept], [result['key'] for result in kept])
            name = f'{variant}/{self.name}'
            numbers |= {name: found.value, f'{name}/low': found.low, f'{name}/high': found.high,
                        f'{name}/num_samples': found.num_samples}
        return numbers


class WordAccuracy(ShapesMetric):
    """Share of pictures that show what one word of their sample says.

    Attributes:
        word: entry of the batch, and attribute of an Observation.
        known: the words that can be observed.
    """

    word = ''
    known: tuple[str, ...] = ()

    def score(self, picture: Tensor, sample: Mapping[str, Any]) -> float:
        """1 if the word is what is observed, else 0; 0 also where nothing is recognised.

        Raises:
            ValueError: the sample's word is none that can be observed.
        """
        return float(getattr(observed(picture), self.word) == self.wanted(sample[self.word], f"'{sample['key']}'"))

    def wanted(self, word: Any, whose: str) -> str:
        """The word, if it is one.

        Raises:
            ValueError: it is not.
        """
        if word not in self.known:
            raise ValueError(f"{type(self).__name__}: the {self.word} {word!r} of {whose} is none that can be seen; "
                             f'known: {", ".join(self.known)}.{nearest(str(word), list(self.known))}')
        return str(word)
