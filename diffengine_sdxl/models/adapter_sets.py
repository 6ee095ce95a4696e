"""Which adapters of a model act: none of them, or one alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffengine_sdxl.models.generate import IMAGE_SETS, ONLY
from diffengine_sdxl.models.partners import Partner, draw_partners
from diffengine_sdxl.structures import Batch


class AdapterSetsMixin:
    """Lets some of an SDXL's adapters act; see the attributes there."""

    adapters: Any
    partners: Mapping[str, Partner]
    training: bool
    #: Set inside `disable_adapters`.
    adapters_disabled = False

    def _note_adapted(self) -> None:
        """Note which components the adapters change, and how."""

    @property
    def image_sets(self) -> tuple[str, ...]:
        """Return which images it can generate: 'base', a fine-tuned one too, and 'adapted' if it has adapters."""
        return IMAGE_SETS if self.adapters else IMAGE_SETS[:1]

    @property
    def only_sets(self) -> tuple[str, ...]:
        """Return the image sets of each adapter alone, where there are several."""
        return tuple(f'{ONLY}{name}' for name in self.adapters) if len(self.adapters) > 1 else ()

    @contextmanager
    def disable_adapters(self) -> Iterator[None]:
        """Compute inside, bitwise, as a model built without adapters. For sampling, not for training."""
        before = self.adapters_disabled
        with ExitStack() as stack:
            for adapter in () if before else self.adapters.values():
                stack.enter_context(adapter.disabled())
            self.adapters_disabled = True
            try:
                yield
            finally:
                self.adapters_disabled = before

    @contextmanager
    def only_adapter(self, name: str) -> Iterator[None]:
        """Compute inside, bitwise, as a model built with this adapter alone, at its own strength."""
        before = {key: getattr(self, key)
                  for key in ('adapters', 'partners', 'mixed_parts', 'text_trains', 'text_adapted')}
        with ExitStack() as stack:
            for other, adapter in self.adapters.items():
                if other != name:
                    stack.enter_context(adapter.disabled())
            self.adapters, self.partners = nn.ModuleDict({name: self.adapters[name]}), {}
            self._note_adapted()
            try:
                yield
            finally:
                for key, value in before.items():
                    setattr(self, key, value)

    def _draw_partners(self, batch: Batch) -> dict[str, Tensor]:
        """Draw on which rows the partners act; set those inside the base, which everything else resets."""
        strengths, factors = dict[str, Tensor](), dict[str, float]()
        if self.training and torch.is_grad_enabled():
            strengths, factors = draw_partners(self.partners, batch, dict(self.adapters.items()))
        for name, adapter in self.adapters.items():
            adapter.set_strength(factors.get(name, 1.0))
        return strengths
