"""How much each adapter changes the denoiser's output, computed as in sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.adapters.base import LARGE_SCALE, Adapter
from diffengine_sdxl.errors import UserError, listed
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Batch


@torch.no_grad()
def relative_effects(model: SDXL, batch: Batch) -> dict[str, float]:
    """Return adapter -> norm of its change of the denoiser's output, relative to the output.

    One keyed noise in the middle of the adapter's active range, with the first row of `batch` that the adapter reads,
    nothing dropped. Left out: adapters of scale 0, those that don't act on the denoiser (an image encoder), and those
    with a new word that no prompt of the batch has. The model's mode and its scales are as before.
    """
    sides = _sides_of_latents(model, batch)
    if sides is None or model.unet.config.in_channels != model.vae.config.latent_channels:
        return {}  # no image, or a UNet for inpainting, whose other inputs only a sampler makes
    x = torch.randn((1, model.unet.config.in_channels, *sides), generator=rng.generator('effect')).to(model.device)
    # What was looked up of a dropped caption is the empty one.
    drop = {name: rows for name, rows in batch.drop.items() if name == 'text' and 'text' in batch.lookups}
    batch, training = replace(batch, drop=drop), model.training
    effects: dict[str, float] = {}
    model.eval()
    try:
        with model.frozen():
            for name, adapter in model.adapters.items():
                words, scale = adapter.new_tokens(), adapter.scale
                rows = [i for i, text in enumerate(batch.text)
                        if not words or adapter.modifies_base or model.reads_word(text, words)]
                if scale == 0 or not rows or not _acts(adapter):
                    continue
                output = _predict(model, batch, rows[0], x, adapter)
                adapter.scale = 0.0
                try:
                    without = _predict(model, batch, rows[0], x, adapter)
                finally:
                    adapter.scale = scale
                effects[name] = float((output - without).norm() / output.norm())
    finally:
        model.train(training)
    return effects


def find_idle(model: SDXL, batch: Batch, effects: Mapping[str, float], untrained: Sequence[str]) -> str | None:
    """Return which adapter, or which layers of one, change nothing; None if all do something.

    Args:
        effects: what `relative_effects` returned. untrained: parameters whose layers need not do anything yet.
    """
    for name, effect in effects.items():
        if effect == 0 and _has_no_effect(model, batch, name):
            return f"the denoiser's output with adapter '{name}' is the same as without it, bit for bit"
    for name, adapter in model.adapters.items():
        layers = [] if adapter.scale == 0 else adapter.idle_layers()
        if idle := [layer for layer in layers if not any(key.startswith(f'{layer}.') for key in untrained)]:
            return f"{len(idle)} layers of adapter '{name}' give the same output as without it ({listed(idle)})"
    return None


def _sides_of_latents(model: SDXL, batch: Batch) -> tuple[int, int] | None:
    """Return height and width of the batch's latents; None if it has no image."""
    moments = batch.lookups.get('moments')
    found = next((value for value in moments.values if value is not None), None) if moments is not None else None
    if batch.latents is not None or found is not None:
        latents = batch.latents if found is None else found['mean']
        height, width = latents.shape[-2:]  # type: ignore[union-attr]
        return height, width
    if batch.img is None:
        return None
    height, width = (side // model.vae_factor for side in batch.img.shape[-2:])
    return height, width


def _has_no_effect(model: SDXL, batch: Batch, name: str) -> bool:
    """Return whether adapter `name` changes nothing at a large scale either: half precision may round it away."""
    adapter, scale = model.adapters[name], model.adapters[name].scale
    try:
        adapter.scale = scale * LARGE_SCALE
    except UserError:  # a kind of scales 0 and 1 (OFT): not known
        return False
    try:
        return relative_effects(model, batch).get(name) == 0
    finally:
        adapter.scale = scale


def _acts(adapter: Adapter) -> bool:
    """Return whether the denoiser's output can depend on it."""
    kind = type(adapter)
    return adapter.modifies_base or kind.contribute is not Adapter.contribute or bool(adapter.new_tokens())


def _predict(model: SDXL, batch: Batch, row: int, x: Tensor, adapter: Adapter) -> Tensor:
    progress = sum(adapter.active_range) / 2
    t = torch.tensor(int((1 - progress) * (model.schedule.num_train_timesteps - 1)), device=x.device)
    conditioning = model.encode(batch, project=True, by_row=True).rows(slice(row, row + 1))
    return model.predict(x, t, conditioning, torch.full((1, 2), progress)).double()
