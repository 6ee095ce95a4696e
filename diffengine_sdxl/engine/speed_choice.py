"""What becomes of the config's `speed` in a run: checked before anything loads, chosen once, taken again on resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from mmengine.config import Config

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models import measured
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.speed import Memory, Speed, image_size


def checked(config: Config) -> Speed:
    """Read `speed` of a resolved config and check that this machine can do it.

    Raises:
        UserError: see `Speed.of` and `Speed.check`.
    """
    from mmengine.device import get_device
    speed = Speed.of(config.get('speed'), config.model)
    speed.check(torch.device(get_device()), config.model, training=config.get('train_cfg') is not None,
                deterministic=_deterministic(config))
    return speed


def choose(speed: Speed, config: Config, model: SDXL, steps: int,
           recorded: Mapping[str, str] | None) -> tuple[Speed, str | None]:
    """Decide what is 'auto', for a model on its device.

    Args:
        speed: as `checked` returns it.
        config: the resolved config.
        steps: optimizer steps to do; 0 without a training.
        recorded: what `record` wrote into the checkpoint that the run goes on from.

    Returns:
        The choice, and a sentence if it differs from what was recorded in a way that changes bits.
    """
    same_device = recorded is not None and recorded['device'] == model.device.type
    before = {name: recorded[name] for name in asdict(speed)} if recorded is not None else {}
    if steps:
        check_checkpointing(speed.checkpointing, model)
    counted = steps and model.device.type == 'cuda' and allows_checkpointing(model)
    memory = _memory(config, model) if counted else None
    chosen = speed.resolve(model.device.type, model.unet_weight.dtype, steps=steps, attention=model.attention,
                           deterministic=_deterministic(config), memory=memory,
                           recorded=before if same_device else None)
    changed = [f"{name} was '{before[name]}', is now '{value}'" for name, value in asdict(chosen).items()
               if before and value != before[name] and name != 'checkpointing']  # which changes no bit
    return chosen, None if not changed else (
        f'speed: {", ".join(changed)}. The run goes on, but sums may be rounded in another order, so it is not bitwise '
        'the run that was not stopped.')


def allows_checkpointing(model: SDXL) -> bool:
    """Return whether the objective lets activations be recomputed; those of a user's own do if they don't say."""
    return bool(getattr(model.objective, 'allows_checkpointing', True))


def check_checkpointing(mode: str, model: SDXL) -> None:
    """Check that the objective allows this `speed.checkpointing`.

    Raises:
        UserError: it does not.
    """
    if mode not in ('auto', 'off') and not allows_checkpointing(model):
        raise UserError(f"speed.checkpointing='{mode}' cannot be used with {type(model.objective).__name__}: the "
                        "backward pass would recompute with other adapters than the forward pass had. Set 'off'.")


def record(speed: Speed, device: torch.device) -> dict[str, str]:
    """Return a resolved `speed` for a checkpoint."""
    return {**asdict(speed), 'device': device.type}


def measure(config: Config, model: SDXL) -> dict[str, Any]:
    """Return what is the fastest for a training on a GPU in half precision, see `measured`; {} for any other.

    {} too where kernels must be deterministic.
    """
    weight = model.unet_weight
    if weight.device.type != 'cuda' or weight.dtype.itemsize > 2 or _deterministic(config):
        return {}
    return measured.measure(model.unet, config.train_dataloader.get('batch_size') or 1)


def _deterministic(config: Config) -> bool:
    return bool((config.get('randomness') or {}).get('deterministic'))


def _memory(config: Config, model: SDXL) -> Memory:
    """Count what the training needs of the GPU's memory, by the counts of `diffengine-sdxl plan`."""
    height, width = image_size(config)
    trained = sum(p.numel() for parameters in model.trainables().values() for _, p in parameters)
    dtype = model.compute_dtype or model.unet_weight.dtype
    free = torch.cuda.mem_get_info(model.device)[0] - model.deferred_bytes  # which are loaded when they are first used
    return Memory.of(config.model, free=free, trained=trained,
                     batch_size=config.train_dataloader.get('batch_size') or 1, pixels=height * width,
                     bytes_per_value=dtype.itemsize)
