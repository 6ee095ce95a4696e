"""What of a run is kept, and by which encoders; the store as its users see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from diffengine_sdxl.cache.keys import digest

#: The kinds of entries: tensors of a sample besides its image; the VAE's mean and std; embeddings of a caption and of
#: images.
KINDS = ('sample', 'moments', 'text', 'image_embeds')


class EntryStore(Protocol):
    """What the users of `cache.store.Store` see."""

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of an entry, on the CPU, or None."""

    def put(self, key: str, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of an entry. Does not wait for the device or the disk, and never fails."""

    def count(self, kind: str, hits: int, misses: int) -> None:
        """Count entries that were found, and that were not; by the process that trains."""

    def file_digest(self, path: Path) -> str:
        """Return the digest of a file's content, read once for as long as the file does not change.

        Raises:
            OSError: it cannot be read.
        """


@dataclass
class CachePlan:
    """What a data set looks up of each sample; made from the model, given to the data set (`attach_cache`).

    Attributes:
        store: where entries are found.
        moments: digest of the VAE; None: the VAE trains.
        text: digest of the text encoders and of how captions are read; None: they train or are adapted.
        images: condition of an image prompt -> digest of the image encoder that reads it.
        empty_when_dropped: a caption that is dropped (drop['text']) is read as '' (`null_prompt='empty'`).
    """

    store: EntryStore
    moments: str | None = None
    text: str | None = None
    images: dict[str, str] = field(default_factory=dict)
    empty_when_dropped: bool = False

    def sample_key(self, row: str) -> str:
        """Return the key of what a sample holds besides its image; `row` is the digest of all that it is made of."""
        return digest('sample', row)

    def moments_key(self, row: str) -> str:
        """Return the key of the VAE's mean and std of a sample's image."""
        return digest('moments', self.moments, row)

    def image_key(self, condition: str, row: str) -> str:
        """Return the key of the embeddings of a sample's image prompt."""
        return digest('image_embeds', self.images[condition], condition, row)

    def text_key(self, text: str, text_2: str | None = None) -> str:
        """Return the key of the embeddings of a caption; `text_2` is the second encoder's, if it is another."""
        return digest('text', self.text, text, text if text_2 is None else text_2)
