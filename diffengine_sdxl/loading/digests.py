"""Digests of frozen components: what they compute depends on weights, settings and dtype, not on names of files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from diffengine_sdxl.cache.keys import digest
from diffengine_sdxl.errors import UserError, first_line
from diffengine_sdxl.loading.files import read_json
from diffengine_sdxl.versions import versions

#: Settings that what is cached does not depend on: who wrote a file, in which dtype, and how latents are scaled, as the
#: VAE's moments are not.
_IGNORED = ('architectures', 'dtype', 'torch_dtype', 'transformers_version', 'scaling_factor', 'shift_factor',
            'latents_mean', 'latents_std')

#: A file -> the digest of its content; `cache.plan.EntryStore.file_digest`.
FileDigest = Callable[[Path], str]


@dataclass(frozen=True)
class Source:
    """What a component is loaded from.

    Attributes:
        config: its config.json.
        weights: files with its weights, and the index of shards if there is one.
        seed: of random weights.
    """

    config: Path
    weights: tuple[Path, ...] = ()
    seed: int | None = None

    def digest(self, name: str, dtype: torch.dtype, file_digest: FileDigest) -> str:
        """Return the digest of component `name` in `dtype`; the same for equal content, wherever it lies.

        Raises:
            UserError: a file cannot be read.
        """
        settings = {key: value for key, value in read_json(self.config).items()
                    if not key.startswith('_') and key not in _IGNORED}
        try:
            weights = [file_digest(path) for path in self.weights]
        except OSError as error:
            raise UserError(f'The weights of the {name} cannot be read: {first_line(error)}.') from error
        # Their code computes; torch draws random weights.
        libraries = {k: versions()[k] for k in ('diffusers', 'transformers')}
        drawn = None if self.seed is None else [self.seed, versions()['torch']]
        return digest('component', name, str(dtype), settings, weights, libraries, drawn)
