"""Sequential CPU offload: keep only the component in use on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn

from diffengine_sdxl.models.sdxl import SDXL

PARTS = ('text_encoder', 'text_encoder_2', 'unet', 'vae')


def offload_models(models: Sequence[SDXL], device: torch.device) -> SequentialOffloadHook:
    """Keep text encoders, UNets and VAEs in CPU memory except while they compute; adapters stay on `device`.

    Unlike diffusers' `enable_model_cpu_offload`, whose order is that of text-to-image, a component that is called
    replaces the previous one in any task.

    Args:
        models: a base and, if there is one, its refiner, which may share components.
    """
    hook = SequentialOffloadHook(device)
    parts = {id(part): part for model in models for name in PARTS if (part := getattr(model, name)) is not None}
    for model in models:
        model.execution_device = device
        model.adapters.to(device)
        model.shared_encoders.to(device)
    for part in parts.values():
        add_hook_to_module(part, hook)
    return hook


class SequentialOffloadHook(ModelHook):  # type: ignore[misc]
    """Move a component to the device when it is called, and the previous one back to the CPU.

    Attributes:
        device: where components compute.
        part: the component on the device, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.part = device, None  # type: torch.device, nn.Module | None

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Move `module` to the CPU when the hook is added."""
        return module.to('cpu')

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Bring `module` to the device; called before its forward, and before a VAE's `encode` and `decode`."""
        if self.part is not module:
            self.release()
            module.to(self.device)
            self.part = module
        # Pass lists on as they are: the UNet pops the feature maps it used, which the caller checks afterwards.
        moved = {k: v if isinstance(v, list) else send_to_device(v, self.device) for k, v in kwargs.items()}
        return send_to_device(args, self.device), moved

    def release(self) -> None:
        """Move the component on the device back to the CPU."""
        if self.part is not None:
            self.part.to('cpu')
            self.part = None
