"""A data set's rows through the cache: what encoders and transforms made of a row is looked up before it is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.logging import print_log
from torch import Tensor

from diffengine_sdxl.cache.keys import digest
from diffengine_sdxl.cache.plan import CachePlan
from diffengine_sdxl.cache.samples import pack_entry, unpack_entry
from diffengine_sdxl.datasets.row_digests import FileDigest, describe, is_ours, plain, tensor_digest
from diffengine_sdxl.datasets.transforms.geometry import GEOMETRY_KEYS
from diffengine_sdxl.structures import Lookups

#: What a sample holds for its transforms only: the number of the geometric variant, a bucket's (height, width).
ONLY_FOR_TRANSFORMS = ('variant', 'bucket')


@dataclass
class Row:
    """A row of which nothing is read yet.

    Attributes:
        load: return its images and all else that it holds.
        texts: return what it holds besides images.
        content: return what its images are made of, by digests (`cache.keys.digest`) and without decoding one; raises
            OSError if a file cannot be read, else what `load` raises. None: only the images themselves tell.
    """

    load: Callable[[], dict[str, Any]]
    texts: Callable[[], dict[str, Any]]
    content: Callable[[FileDigest], Any] | None


class RowCache:
    """Look up the rows of one data set; entries are only read here, and made for the process that trains.

    Args:
        plan: what is kept, and where.
        transforms: of the data set.
        variants: number of geometric variants of each image; None: drawn anew in every epoch.
        draws_anew: whether the data set itself draws images of which no number is known.
        source: how the log names the data.
    """

    def __init__(self, plan: CachePlan, transforms: Sequence[Any], variants: int | None, draws_anew: bool,
                 source: str) -> None:
        self.plan, self.transforms, self.variants = plan, transforms, variants
        #: Whether all transforms are known, so that their settings and draws tell what they make.
        self.described = all(is_ours(t) and hasattr(t, 'reads') for t in transforms)
        draws_anew = draws_anew or any(getattr(t, 'draws_anew', False) for t in transforms)
        #: Whether what is made of images may be found again.
        self.keeps_images = variants is not None or not draws_anew
        #: Whether images need not be read; those that train the VAE are.
        self.looks_up = self.keeps_images and plan.moments is not None
        self._transforms: str | None = None
        if not self.keeps_images and (plan.moments is not None or plan.images):
            print_log(f'{source}: images are cropped anew in every epoch, so what encoders make of them is not cached. '
                      'Set `variants` of the data set to the number of crops and flips of each image that are drawn '
                      'and kept, such as variants=4.', logger='current', level=logging.WARNING)

    def sample(self, row: Row, head: dict[str, Any], run: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """Return the sample of a row with its 'lookups'; its images are read unless all of it is found.

        Args:
            head: what is set of a sample before its transforms.
            run: set `head`, and run all transforms on what a row holds.
        """
        described = self.described and self.looks_up and row.content is not None
        rest = {**row.texts(), **head} if described else {}
        name = self._row_digest(row, rest) if described else None
        lookups: dict[str, Lookups] = {}
        if name is not None:
            prompts = [key for key in self.plan.images if f'{key}_embeds' not in rest]
            lookups = self._image_lookups(name, prompts)
            sample_key = self.plan.sample_key(digest(name, sorted(prompts)))
            entry = self.plan.store.get(sample_key)
            if entry is not None and all(found.values[0] for found in lookups.values()):
                sample = self._found(rest, entry, prompts)
                return self._with_text(sample, {**lookups, 'sample': Lookups([sample_key], [None])})
        sample = run(row.load())
        if name is not None and self._row_digest(row, rest) != name:  # a file was replaced meanwhile
            name = None
        if name is None:
            return self._with_text(sample, self._pixel_lookups(sample) if self.keeps_images else {})
        lookups = {key: found for key, found in lookups.items() if key == 'moments' or key in sample}
        new = None if entry is not None else pack_entry({
            key: value for key, value in sample.items()
            if isinstance(value, Tensor) and key != 'img' and key not in prompts})
        return self._with_text(sample, {**lookups, 'sample': Lookups([sample_key], [new])})

    def _row_digest(self, row: Row, rest: dict[str, Any]) -> str | None:
        """Return the digest of all that the images of a sample are made of; None if a file cannot be read."""
        assert row.content is not None
        store = self.plan.store
        try:
            content = row.content(store.file_digest)
        except OSError:
            return None  # reading the images says why
        images = [t for t in self.transforms if t.reads == 'images']
        if self._transforms is None:
            self._transforms = digest([describe(t, store.file_digest) for t in images])
        drawn = [t.draws(rest) if hasattr(t, 'draws') else None for t in images]
        # Numbers of a row may take part, such as its original size in the time ids.
        numbers = {key: tensor_digest(value) if isinstance(value, Tensor) else plain(value)
                   for key, value in rest.items() if isinstance(value, Tensor) or key in GEOMETRY_KEYS}
        return digest(content, self._transforms, drawn, numbers, rest.get('bucket'))

    def _image_lookups(self, row: str, prompts: Sequence[str]) -> dict[str, Lookups]:
        plan = self.plan
        keys = {} if plan.moments is None else {'moments': plan.moments_key(row)}
        keys |= {key: plan.image_key(key, row) for key in prompts}
        return {name: Lookups([key], [plan.store.get(key)]) for name, key in keys.items()}

    def _pixel_lookups(self, sample: dict[str, Any]) -> dict[str, Lookups]:
        """Look up by the pixels themselves what a user's own data set or transforms made."""
        lookups: dict[str, Lookups] = {}
        names = {'img': 'moments'} if self.plan.moments is not None else {}
        for key, name in (names | {key: key for key in self.plan.images}).items():
            if isinstance(sample.get(key), Tensor):
                moments = name == 'moments'
                found = self._image_lookups(tensor_digest(sample[key]), [] if moments else [key])[name]
                # A transform that draws anew in each epoch must not fill the disk.
                if found.values == [None] and sample['epoch'] >= (self.variants or 1):
                    found = Lookups([''], [None])
                lookups[name] = found
        return lookups

    def _found(self, rest: dict[str, Any], entry: dict[str, Tensor], prompts: Sequence[str]) -> dict[str, Any]:
        """Return the sample of a row that was found: its texts are transformed, its images are None."""
        sample = rest
        for transform in self.transforms:
            if transform.reads == 'text':
                sample = transform(sample)
        sample = {key: value for key, value in sample.items()
                  if not isinstance(value, Tensor) and key not in (*ONLY_FOR_TRANSFORMS, *GEOMETRY_KEYS)}
        return {**sample, **unpack_entry(entry), 'img': None, **dict.fromkeys(prompts)}

    def _with_text(self, sample: dict[str, Any], lookups: dict[str, Lookups]) -> dict[str, Any]:
        plan = self.plan
        if plan.text is not None and 'text' in sample and 'text_embeds' not in sample:
            dropped = plan.empty_when_dropped and sample.get('drop', {}).get('text', False)
            key = plan.text_key('') if dropped else plan.text_key(sample['text'], sample.get('text_2'))
            lookups['text'] = Lookups([key], [plan.store.get(key)])
        return {**sample, 'lookups': lookups}
