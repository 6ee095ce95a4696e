"""What samplers, objectives and adapters may use of a model; `models.sdxl.SDXL` implements it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffengine_sdxl.cache.plan import EntryStore
from diffengine_sdxl.noise_schedule import NoiseSchedule
from diffengine_sdxl.structures import AttentionProbes, Batch, Conditioning


class Components(Protocol):
    """The loaded components of a base, and the sizes that follow from them."""

    unet: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    tokenizer: Any
    tokenizer_2: Any
    vae_factor: int
    trainable_parts: tuple[str, ...]

    @property
    def unet_weight(self) -> Tensor:
        """Return a weight of the UNet, for its dtype."""

    @property
    def device(self) -> torch.device:
        """Return the device it computes on."""


class AdapterHost(Components, Protocol):
    """What an adapter may use of the model that it is attached to."""

    attention: str
    #: What the base is loaded from; None: random weights.
    pretrained: str | None
    #: Frozen image encoders, which IP-Adapters share.
    shared_encoders: nn.ModuleDict
    #: Whether frozen encoders are loaded at their first use.
    lazy_encoders: bool

    def never_read(self, part: str, name: str) -> bool:
        """Return whether no loss depends on parameter `name` of `part`, so that it never gets a gradient."""


class Denoiser(Components, Protocol):
    """What a sampler or an objective may use of a model."""

    schedule: NoiseSchedule
    adapters: Mapping[str, Any]

    @property
    def store(self) -> EntryStore | None:
        """Return where what frozen encoders compute of training samples is kept."""

    @property
    def size_divisor(self) -> int:
        """Return what sides of images must be divisible by, in pixels."""

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """Return the config of a diffusers scheduler that samples from this model's noise schedule."""

    def encode(self, batch: Batch, branches: Sequence[str] = ('cond',), project: bool = False,
               by_row: bool | None = None) -> Conditioning:
        """Encode a batch's prompts and conditions; several guidance branches are stacked along the batch."""

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning, progress: Tensor,
                probes: AttentionProbes | None = None) -> Tensor:
        """Return the UNet's raw output, [B, 4, h, w]."""

    def latents(self, batch: Batch) -> Tensor:
        """Encode a batch's images to scaled latents, [B, 4, h, w]."""

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and std of a batch's unscaled latents, [B, 4, h, w], by a frozen VAE, one image a call."""

    def posterior(self, batch: Batch) -> Any:
        """The VAE's distribution of the unscaled latents: `mean`, `std` [B, 4, h, w], `kl()` [B]."""

    def encode_images(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to scaled latents, each drawn with its own generator."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to images [B, 3, H, W] in [0, 1]."""

    def trainables(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Return what trains: name of a component or adapter -> its parameters with their full names."""

    def frozen(self) -> AbstractContextManager[None]:
        """Let no weight require gradients inside."""

    def only_adapter(self, name: str) -> AbstractContextManager[None]:
        """Compute as a model with one adapter inside."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over all parameters with their full names."""


class Model(Denoiser, Protocol):
    """What the other files of `models` use of an SDXL; see the attributes there."""

    pretrained: str | None
    other_unet: str | None
    sampler: Any
    null_prompt: str
    caption_chunks: int
    adapters_disabled: bool
    text_trains: bool
    text_adapted: bool
    mixed_parts: set[str]
    prompt_cache: dict[Any, tuple[Tensor, Tensor]] | None

    @property
    def is_refiner(self) -> bool:
        """Return whether the UNet takes an aesthetic score in place of the target size."""

    @property
    def image_sets(self) -> tuple[str, ...]:
        """Return which images it can generate: 'base', and 'adapted' if there are adapters."""

    @property
    def only_sets(self) -> tuple[str, ...]:
        """Return the image sets of each adapter alone."""

    def new_tokens(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return the adapters' new tokens for each text encoder: token -> its vectors, [n, D]."""

    def disable_adapters(self) -> AbstractContextManager[None]:
        """Compute as a model without adapters inside."""

    def autocast(self, enabled: bool) -> AbstractContextManager[Any]:
        """Compute in the model's precision inside, if `enabled` and it is not fp32."""
