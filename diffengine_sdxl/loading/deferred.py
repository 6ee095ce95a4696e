"""Frozen components that are loaded at their first use: a run whose cache has all that they compute loads none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmengine.logging import print_log
from torch import nn

from diffengine_sdxl import rng
from diffengine_sdxl.loading.digests import Source

#: Component -> what the log calls it.
TITLES = {'vae': 'VAE', 'text_encoder': 'first text encoder', 'text_encoder_2': 'second text encoder',
          'image_encoder': 'image encoder'}


class Deferred:
    """Stands for a component until its first use: a call, or any attribute that is not known without it.

    Then the component is loaded, frozen, in evaluation mode and on its model's device, and takes its place there.

    Args:
        name: of TITLES.
        config: the component's.
        dtype: of its weights.
        load: loads it, in this dtype or another.
        source: what `load` reads.
        num_bytes: of its weights in `dtype`.
        skeleton: the component without weights (on the meta device), if its layers may be asked for.
    """

    def __init__(self, name: str, config: Any, dtype: torch.dtype, load: Callable[[], nn.Module], source: Source,
                 num_bytes: int, skeleton: nn.Module | None = None) -> None:
        self.config, self.dtype, self.source = config, dtype, source
        self.num_bytes, self.skeleton = num_bytes, skeleton
        self._name, self._load, self._module = name, load, None  # type: str, Any, nn.Module | None

    @property
    def device(self) -> torch.device:
        """The device where it will compute."""
        device: torch.device = self._device()
        return device

    def place(self, owner: nn.Module, attribute: str, device: Callable[[], torch.device]) -> None:
        """Be `owner.attribute` until it is loaded; `device` returns where it shall compute."""
        owner.register_module(attribute, None)  # so that the owner's modules keep their order
        owner.__dict__[attribute] = self
        self._owner, self._attribute, self._device = owner, attribute, device

    def load(self, reason: str | None = None) -> nn.Module:
        """Return the component, loaded and put in its place if need be; `reason` is for the log.

        Raises:
            UserError: it cannot be loaded.
        """
        if self._module is None:
            with rng.fork('deferred', self._name):  # a load in the middle of a step draws no number of the step's
                module = self._load()
            # diffusers' own `to` warns of parts to keep in fp32: none.
            self._module = nn.Module.to(module, self.device, self.dtype).eval().requires_grad_(False)
            self._owner.__dict__.pop(self._attribute)
            setattr(self._owner, self._attribute, self._module)
            print_log(f'Loaded the {TITLES[self._name]}: {reason or "something needs it"}.',
                      logger='current')
        return self._module

    def digest(self, file_digest: Any) -> str:
        """Return what `Source.digest` does, for this component and dtype."""
        return self.source.digest(self._name, self.dtype, file_digest)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name in ('_owner', '_device', '_module'):
            raise AttributeError(name)
        return getattr(self.load(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the component."""
        return self.load()(*args, **kwargs)


def loaded(component: Any, reason: str | None = None) -> Any:
    """Return the component itself, where a Deferred stands for it (see `Deferred.load`)."""
    return component.load(reason) if isinstance(component, Deferred) else component


def skeleton(component: Any) -> Any:
    """Return modules of the same names and shapes without loading anything: the component's own if it is loaded."""
    return component.skeleton if isinstance(component, Deferred) else component
