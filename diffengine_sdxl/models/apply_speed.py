"""Make a model compute as its resolved `speed` says."""

from __future__ import annotations

import functools

from torch import nn

from diffengine_sdxl.adapters.changed_layer import ChangedLayer
from diffengine_sdxl.models.compiled import compile_blocks, set_checkpointing
from diffengine_sdxl.models.cuda_graph import UNetGraphs
from diffengine_sdxl.models.prompt_branches import ENCODERS
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.speed import QUANTIZED, Speed


def apply_speed(model: SDXL, speed: Speed) -> None:
    """Quantize, checkpoint and compile the UNet of `model`, which is on its device with all adapters attached.

    Args:
        speed: resolved.
    """
    if speed.base_dtype in QUANTIZED:
        quantize(model, speed.base_dtype)
    if speed.checkpointing != 'off':
        set_checkpointing(model.unet, speed.checkpointing)
    for part in ENCODERS:
        if part in model.trainable_parts and speed.checkpointing == 'full':
            getattr(model, part).gradient_checkpointing_enable()
    if speed.compile == 'blocks':
        for network in (model.unet, *model.adapters.values()):  # a ControlNet has such blocks too
            compile_blocks(network)
    elif speed.compile == 'graph':
        model.unet_graphs = UNetGraphs(model)


def quantize(model: SDXL, base_dtype: str) -> None:
    """Quantize the linear layers in the UNet's transformer blocks, 85 % of its weights, with a scale for each output.

    They compute in the dtype of their input, as before, and a gradient passes through them. Layers of adapters stay,
    and those whose weights a ChangedLayer reads.

    Args:
        base_dtype: 'fp8' or 'int8'.
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    kept = {id(p) for adapter in model.adapters.values() for p in adapter.all_parameters()}
    kept |= {id(module.get_base_layer().weight) for module in model.unet.modules() if isinstance(module, ChangedLayer)}
    quantize_(model.unet, Float8WeightOnlyConfig() if base_dtype == 'fp8' else Int8WeightOnlyConfig(),
              filter_fn=functools.partial(_is_quantized, kept))


def _is_quantized(kept: set[int], module: nn.Module, name: str) -> bool:
    """Return whether a layer of the UNet is in a transformer block, and a frozen one of the base's."""
    return isinstance(module, nn.Linear) and 'transformer_blocks' in name and id(module.weight) not in kept
