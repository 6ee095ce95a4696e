"""Models on a device: all of it, or each part only while it is at work (CPU offload, by accelerate's hooks)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device

PARTS = ('text_encoder', 'text_encoder_2', 'unet', 'vae')


def device_of(name: str | torch.device | None) -> torch.device:
    """The device of that name; None for the best there is.

    Raises:
        ValueError: there is no such device here.
    """
    if name is None:
        from mmengine.device import get_device
        name = get_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device='{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def place(models: Sequence[Any], device: torch.device, offload: bool) -> Callable[[], None]:
    """Move SDXLs to `device`; what is returned lets go of the part that was last at work, after each picture.

    Args:
        models: a base, and a refiner, if there is one, which may share parts.
        offload: keep text encoders, UNet and VAE in the CPU's memory but while they work, one at a time; adapters stay
            on the device. Unlike diffusers' `enable_model_cpu_offload`, whose order is that of text-to-image, a part
            that comes sends the former away in any task.
    """
    if not offload:
        for model in models:
            model.to(device)
        return lambda: None
    turn = Turn(device)
    parts = {id(part): part for model in models for name in PARTS if (part := getattr(model, name)) is not None}
    for model in models:
        model.execution_device = device
        model.adapters.to(device)
        if hasattr(model, 'shared'):
            model.shared.to(device)
    for part in parts.values():
        add_hook_to_module(part, turn)
    return turn.over


class Turn(ModelHook):  # type: ignore[misc]
    """Whose turn it is on the device: one part's, from its call to that of another one.

    Attributes:
        device: on which parts work.
        part: the one that is there, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.part = device, None  # type: torch.device, Any

    def init_hook(self, module: Any) -> Any:
        """Parts wait in the CPU's memory."""
        return module.to('cpu')

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Called before `module` works, also by diffusers' own `encode` and `decode` of a VAE."""
        if self.part is not module:
            self.over()
            module.to(self.device)
            self.part = module
        # Lists as they are: from that of feature maps the UNet takes out what it uses, which is looked at afterwards.
        sent = {k: v if isinstance(v, list) else send_to_device(v, self.device) for k, v in kwargs.items()}
        return send_to_device(args, self.device), sent

    def over(self) -> None:
        """Send back the part that is there."""
        if self.part is not None:
            self.part.to('cpu')
            self.part = None
