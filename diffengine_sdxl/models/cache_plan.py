"""What of a model's frozen encoders a cache may keep, and computing it without the UNet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from diffengine_sdxl.cache.plan import CachePlan, EntryStore
from diffengine_sdxl.loading.base import MODULES
from diffengine_sdxl.loading.deferred import Deferred
from diffengine_sdxl.loading.digests import FileDigest
from diffengine_sdxl.models.prompt_branches import encode_text, text_digest
from diffengine_sdxl.registry import SCOPE
from diffengine_sdxl.structures import Batch


class CacheMixin:
    """The methods of SDXL for what a cache holds."""

    adapters: Any
    #: Component -> how it is loaded, of those that `lazy_encoders` loads at their first use, loaded or not.
    deferred: dict[str, Deferred]
    _store: EntryStore | None = None

    @property
    def store(self) -> EntryStore | None:
        """Where what frozen encoders compute of training samples is kept; None: nowhere."""
        return self._store

    @store.setter
    def store(self, store: EntryStore | None) -> None:
        self._store = store
        for adapter in self.adapters.values():
            adapter.store = store

    @property
    def deferred_bytes(self) -> int:
        """Bytes of the weights that are not loaded yet."""
        parts = [*(getattr(self, name) for name in MODULES), *(a.encoder.net for a in self._image_prompts())]
        return sum(part.num_bytes for part in {id(p): p for p in parts}.values() if isinstance(part, Deferred))

    def component_digest(self, part: str, file_digest: FileDigest) -> str:
        """Return the digest of a frozen component of a model with `lazy_encoders`: weights, config and dtype.

        Raises:
            UserError: a file cannot be read.
        """
        return self.deferred[part].digest(file_digest)

    @torch.no_grad()
    def encode_frozen(self: Any, batch: Batch) -> None:
        """Compute and keep what `batch.lookups` lacks: latents, text, and image prompts.

        Raises:
            UserError: see `latents`, `encode_text` and `Adapter.encode`.
        """
        if 'moments' in batch.lookups:
            self.moments(batch)
        if 'text' in batch.lookups:
            encode_text(self, batch, 'cond', one_by_one=True)
        for adapter in self._image_prompts():
            if adapter.condition_key in batch.lookups:
                tensors = adapter.encode_rows(batch)
                if adapter.name in batch.drop:
                    adapter.null(tensors)

    def _image_prompts(self) -> Iterator[Any]:
        """Yield the adapters that read images through a frozen encoder."""
        return (adapter for adapter in self.adapters.values() if hasattr(adapter, 'encoder'))


def cache_plan(model: Any, store: EntryStore) -> CachePlan:
    """Return what a data set may look up for `model`, an SDXL with `lazy_encoders`; let it keep the rest in `store`.

    Nothing of an encoder that trains or is adapted; no images where the objective reads them itself; of a condition
    that several adapters read nothing, unless they read the same of it.

    Raises:
        UserError: files of an encoder cannot be read.
    """
    model.store = store
    images: dict[str, set[str | None]] = {}
    for adapter in model._image_prompts():
        images.setdefault(adapter.condition_key, set()).add(adapter.encoder.digest(adapter.plus, store.file_digest))
    for adapter in model.adapters.values():  # others read the images themselves
        if not hasattr(adapter, 'encoder'):
            images.pop(adapter.condition_key, None)
    # A user's own class says so itself: what it adds to one of ours may read images.
    own = type(model.objective)
    inherits = not own.__module__.startswith(f'{SCOPE}.') and 'reads_images' not in vars(own)
    reads_images = model.objective is not None and (inherits or getattr(own, 'reads_images', True))
    return CachePlan(
        store, moments=None if reads_images or 'vae' not in model.deferred else
        model.component_digest('vae', store.file_digest),
        text=text_digest(model, lambda part: model.component_digest(part, store.file_digest)),
        images={key: found for key, digests in images.items() if len(digests) == 1 for found in digests
                if found is not None},
        empty_when_dropped=model.null_prompt == 'empty')
