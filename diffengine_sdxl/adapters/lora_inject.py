"""Put a LoRA's weights, of any kinds, into a part of the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffengine_sdxl.adapters import lora_layers
from diffengine_sdxl.adapters.formats import peft_lora
from diffengine_sdxl.adapters.formats.lora_weights import MIXED, OTHER, LoRAWeights


def inject_weights(module: nn.Module, part: str, weights: LoRAWeights, modules: Mapping[str, nn.Module], adapter: str,
                   trainable: bool, dropout: float = 0.0, init: bool | str = 'gaussian') -> dict[str, Any]:
    """Inject wrappers with loaded weights, or with fresh ones where `weights` has no tensors.

    Args:
        module: the base's `part`. modules: its plain layers and norms. adapter: whose weights they are.
        dropout, init: see LoRA.

    Returns:
        The wrappers by the name of the layer, in the part's order.
    """
    wrappers: dict[str, Any] = {}
    for group in weights.by_kind():
        if part in group.parts:
            precise = trainable or group.kind == 'oft'
            dtypes = {name: stored_dtype(layer, precise) for name, layer in modules.items()}
            wrappers |= _inject(module, part, group, modules, adapter, dropout, init, dtypes)
    for wrapper in wrappers.values():
        lora_layers.set_precision(wrapper, adapter)
    return wrappers if weights.kind != MIXED else lora_layers.layers(module, adapter)


def _inject(module: nn.Module, part: str, group: LoRAWeights, modules: Mapping[str, nn.Module], adapter: str,
            dropout: float, init: bool | str, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """Inject the layers of one kind."""
    own = group.parts[part]
    tensors = own.by_layer()
    if group.kind == OTHER:
        factors = {name: own.alpha[name] / rank for name, rank in own.rank.items()}
        return lora_layers.inject_changes(module, adapter, tensors, factors, dtypes)
    config = peft_lora.config(group, part, modules, dropout, init, 0 if tensors else next(iter(own.rank.values())))
    wrappers = lora_layers.inject(module, config, adapter)
    names = set(tensors or own.rank)
    assert set(wrappers) == names, set(wrappers) ^ names
    for name, wrapper in wrappers.items():
        if tensors:
            lora_layers.set_weights(wrapper, adapter, tensors[name])
        else:
            lora_layers.reset_weights(wrapper, adapter, init)
        for parameter in lora_layers.weights(wrapper, adapter).values():
            parameter.data = parameter.data.to(dtypes[name])
    return wrappers


def stored_dtype(layer: Any, precise: bool) -> torch.dtype:
    """Return a layer's dtype, or fp32: for what trains, and for peft's OFT, which has no inverse in half precision."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return torch.promote_types(weight.dtype, torch.float32) if precise else weight.dtype
