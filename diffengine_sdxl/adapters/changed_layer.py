"""A layer of the base with changes that no kind of peft has: whole weights, biases, norms, other decompositions.

With W and b the layer's weight and bias, D the change by the tensors' kind, f = alpha / rank and s the scale:

    without magnitudes    W + s f D                      b + s diff_b
    with magnitudes m     m (W + s f D) / ||W + s f D||  b + s diff_b

The norm is over a row (one output channel) for m [out, 1, ...], or over all that reads one input channel for
m [1, in, ...] (LyCORIS' wd_on_out=False). As in peft's DoRA, the scale multiplies D, and the norm has no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffengine_sdxl.adapters.formats.lora_weights import product_kind, weight_change

NORMS = (nn.LayerNorm, nn.GroupNorm)


class ChangedLayer(nn.Module):
    """A layer and its changes by one adapter; nests with peft's wrappers, whose attributes it has.

    Args:
        layer: the plain layer of the base, of lora_layers.LAYERS or NORMS.
        adapter: whose changes they are.
        tensors: by the names of `formats.lora_weights.PartWeights`; copied.
        factor: alpha / rank, for D.
        dtype: of the copies.
    """

    def __init__(self, layer: Any, adapter: str, tensors: Mapping[str, Tensor], factor: float,
                 dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer: nn.Module = layer
        self.adapter, self.factor = adapter, factor
        #: Set by LoRA, as for peft's wrappers.
        self.scaling = {adapter: 1.0}
        self._active_adapter = [adapter]
        self.rows: Tensor | None = None
        # A parameter's name has no dots.
        self._names = {key.replace('.', '_'): key for key in sorted(tensors)}
        self.changes = nn.ParameterDict({
            name: nn.Parameter(tensors[key].detach().to(layer.weight.device, dtype, copy=True))
            for name, key in self._names.items()})

    @property
    def active_adapters(self) -> list[str]:
        """The adapter's name in a list, which is empty while it is switched off."""
        return self._active_adapter

    @property
    def weight(self) -> Any:
        """The base's weight, for code that asks for its dtype or shape."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base's bias."""
        return self.base_layer.bias

    def get_base_layer(self) -> Any:
        """Return the plain layer below all wrappers."""
        layer: Any = self.base_layer
        while hasattr(layer, 'base_layer'):
            layer = layer.base_layer
        return layer

    def _get_available_adapters(self) -> set[str]:
        return {self.adapter}

    def weights(self) -> dict[str, nn.Parameter]:
        """Return its parameters by their names in files."""
        return {key: self.changes[name] for name, key in self._names.items()}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the changed layer's output, in the dtype of the layer's."""
        layer, own, scale = self.get_base_layer(), self.weights(), self.scaling[self.adapter]
        if isinstance(layer, NORMS):
            result = self.base_layer(x, *args, **kwargs)
            return (result + scale * _normalized(layer, x, own)).to(result.dtype)
        change: Tensor | None = None
        gain: Tensor | None = None
        if kind := product_kind(own):
            change = weight_change(kind, own).reshape(layer.weight.shape)
        if change is not None and 'dora_scale' in own:
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            with torch.no_grad():
                whole = layer.weight.to(dtype) + scale * self.factor * change.to(dtype)
                by_input = own['dora_scale'].shape[0] == 1
                axes = [axis for axis in range(whole.dim()) if axis != int(by_input)]
                norm = torch.linalg.vector_norm(whole, dim=axes, keepdim=True) + torch.finfo(dtype).eps
            gain = own['dora_scale'] / norm
            if by_input:
                # Scaled inputs are scaled columns; what other adapters add below is decomposed with the base.
                x, gain = x * _channels(layer, gain, x).to(x.dtype), None
        result = self.base_layer(x, *args, **kwargs)
        output = result
        if change is not None:
            delta = scale * self.factor * _apply(layer, x.to(change.dtype), change)
            if gain is None:
                output = output + delta
            else:
                bias = 0 if layer.bias is None else _channels(layer, layer.bias, result)
                output = (output - bias + delta) * _channels(layer, gain, result) + bias
        if 'diff_b' in own:
            output = output + scale * _channels(layer, own['diff_b'], result)
        return output.to(result.dtype)


def _normalized(layer: Any, x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """Return what the changes of a norm's weight and bias add to its output."""
    dtype = next(iter(own.values())).dtype
    bias = own.get('b_norm')
    if 'w_norm' not in own:
        assert bias is not None, 'a norm has a change of its weight or of its bias'
        return bias if isinstance(layer, nn.LayerNorm) else bias.view(-1, *[1] * (x.dim() - 2))
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x.to(dtype), layer.normalized_shape, own['w_norm'], bias, layer.eps)
    return F.group_norm(x.to(dtype), layer.num_groups, own['w_norm'], bias, layer.eps)


def _apply(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Apply a weight of the layer's shape as the layer applies its own, without a bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def _channels(layer: Any, values: Tensor, x: Tensor) -> Tensor:
    """Return one value for each channel, in a shape that broadcasts over the layer's input or output x."""
    return values.reshape(-1) if isinstance(layer, nn.Linear) else values.reshape(-1, *[1] * (x.dim() - 2))
