"""peft's wrappers and ours in a component of the base: inject and remove them, read and set their weights, switch them.

A wrapper replaces a layer: `to_q` becomes a LoraLayer that holds the layer as `base_layer` and the weights by the
adapter's name. Every adapter has its own wrappers, nested in the order of attaching, so that no two share a flag.
Layers are named here as they are without wrappers.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from diffengine_sdxl.adapters import lora_function
from diffengine_sdxl.adapters.changed_layer import NORMS, ChangedLayer
from diffengine_sdxl.adapters.precision import autocast
from diffengine_sdxl.errors import UserError, did_you_mean
from diffengine_sdxl.structures import where

#: The layers of SDXL that peft can wrap.
LAYERS = (nn.Linear, nn.Conv2d)


class Wrapper:
    """What wrappers of all kinds do before they compute as their own class; a base class in front of that one.

    The forward is the class's and knows neither the wrapper nor its layer by name, so torch.compile traces it once for
    all blocks.

    Attributes:
        rows: bool [B], on which rows of x it acts, B being the first dimension; None: on all.
        plain_lora: whether it is a LoRA of a linear layer, without decomposition and bias.
        mixed: whether its weights have another dtype than the layer's, which is half precision.
        copies: A and s B of the current call in the layer's dtype, see `lora_function`; None: cast them in the layer.
    """

    base_layer: Any
    rows: Tensor | None
    plain_lora: bool
    mixed: bool
    copies: tuple[Tensor, Tensor] | None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute; an inactive one returns the layer's output unchanged, in its dtype."""
        names = self.active_adapters
        if not names:
            inactive: Tensor = self.base_layer(x, *args, **kwargs)
            return inactive
        if self.plain_lora and len(names) == 1 and not self.merged and lora_function.used_on(self.weight):
            a, b = self.copies or _cast_weights(self, names[0])
            dropout = self.lora_dropout[names[0]]
            active = dropout if dropout.training and not isinstance(dropout, nn.Identity) else None
            return lora_function.lora_linear(self.base_layer, x, a, b, self.rows, active)
        if self.mixed:
            # Only here: autocast around the whole component would compute all its norms in fp32 on a GPU.
            with autocast(x.device.type, self.weight.dtype):
                output: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            output = output.to(self.weight.dtype)
        else:
            output = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return output if self.rows is None else where(self.rows, output, self.base_layer(x, *args, **kwargs))

    def __reduce__(self: Any) -> Any:
        """Copy and pickle without the compute copies; the class is made anew."""
        return _rebuild, (type(self).__mro__[2],), {**self.__dict__, 'copies': None}


@functools.cache
def _wrapper_class(kind: Any) -> Any:
    """Return the class of a kind of wrapper with the forward of `Wrapper`, by the same name."""
    return type(kind.__name__, (Wrapper, kind), {})


def _rebuild(kind: Any) -> Any:
    cls = _wrapper_class(kind)
    return cls.__new__(cls)


def _cast_weights(wrapper: Any, adapter: str) -> tuple[Tensor, Tensor]:
    a, b, dtype = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight, wrapper.weight.dtype
    return a.to(dtype), (b * wrapper.scaling[adapter]).to(dtype)


def _is_wrapper(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    return isinstance(module, BaseTunerLayer | ChangedLayer)


def _tree(part: nn.Module) -> Iterator[tuple[str, nn.Module, list[Any]]]:
    """Yield every module that `part` has without wrappers: name, module, and its wrappers, the outermost first."""
    stack: list[tuple[str, nn.Module]] = [('', part)]
    while stack:
        name, module = stack.pop()
        wrappers = []
        while _is_wrapper(module):
            wrappers.append(module)
            module = module.get_submodule('base_layer')
        yield name, module, wrappers
        stack.extend((f'{name}.{child}'.lstrip('.'), m) for child, m in reversed(list(module.named_children())))


def plain(part: nn.Module) -> dict[str, nn.Module]:
    """Return the linear and convolution layers of `part` by name, in its order, without wrappers."""
    return {name: module for name, module, _ in _tree(part) if isinstance(module, LAYERS)}


def norms(part: nn.Module) -> dict[str, nn.Module]:
    """Return the norms of `part` that have weights by name, in its order, without wrappers."""
    return {name: module for name, module, _ in _tree(part) if isinstance(module, NORMS)
            and module.weight is not None}


def layers(part: nn.Module, adapter: str) -> dict[str, Any]:
    """Return the wrappers with weights of `adapter` by the name of the layer, in the part's order."""
    return {name: wrapper for name, _, wrappers in _tree(part) for wrapper in wrappers
            if adapter in wrapper._get_available_adapters()}


def find_layers(targets: Sequence[str], parts: Mapping[str, nn.Module], adapter: str) -> dict[str, list[str]]:
    """Resolve targets to layers: part -> names, in the part's order.

    Args:
        targets: full names ('unet.mid_block.attentions.0.proj_in'), patterns of full names ('unet.*.attn2.to_k'), or
            ends of names ('to_q', 'ff.net.0.proj').
        parts: part -> its module.
        adapter: whose targets they are, for errors.

    Raises:
        UserError: a target matches no layer, or a layer of another adapter.
    """
    layer_names = {f'{part}.{name}': (part, name) for part, module in parts.items() for name in plain(module)}
    inner_names = [f'{part}.{name}.{inner}' for part, module in parts.items() for name, _, wrappers in _tree(module)
                   for inner, _ in (wrappers[0].named_modules() if wrappers else ()) if inner]
    chosen = set()
    for target in targets:
        if others := [name for name in inner_names if _matches(target, name)]:
            raise UserError(f"The target '{target}' of adapter '{adapter}' also matches '{others[0]}', a layer of "
                            f'another adapter ({len(others)} in all). Use ends of names (to_q) or a pattern that ends '
                            'with a layer of the base (unet.*.attn1.to_q).')
        matches = {name for name in layer_names if _matches(target, name)}
        if not matches:
            ends = dict.fromkeys('.'.join(name.split('.')[-n:]) for name in layer_names for n in (1, 2, 3))
            raise UserError(f"The target '{target}' of adapter '{adapter}' matches no linear or convolution layer of "
                            f'{", ".join(parts)}.{did_you_mean(target, [*layer_names, *ends])}')
        chosen |= matches
    return {part: [name for full, (p, name) in layer_names.items() if p == part and full in chosen] for part in parts}


def _matches(target: str, name: str) -> bool:
    """Return whether a target matches the layer of this full name."""
    if any(char in target for char in '*?['):
        return fnmatchcase(name, target)
    return name == target or name.endswith(f'.{target}')


def inject(part: nn.Module, config: Any, adapter: str) -> dict[str, Any]:
    """Let peft inject an adapter into `part`, around the wrappers that are there; nothing else changes.

    peft sees the plain layers only: it cannot wrap the convolution of another kind, makes the newest adapter of a
    wrapper the only active one, and leaves a `peft_config` on the module, which warns at the next injection.

    Args:
        config: a PeftConfig whose targets are names of layers.
        adapter: the name of its weights.

    Returns:
        The wrappers by the name of the layer.
    """
    from peft import inject_adapter_in_model
    requires_grad = [(p, p.requires_grad) for p in part.parameters()]
    outermost = {name: wrappers[0] for name, _, wrappers in _tree(part) if wrappers}
    with unwrapped(part), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of OFT's block sizes that don't divide a width; see LoRA's `rank`
        inject_adapter_in_model(config, part, adapter_name=adapter)
        injected = layers(part, adapter)
    del part.peft_config
    for parameter, value in requires_grad:
        parameter.requires_grad_(value)
    for name, wrapper in injected.items():
        _nest(part, name, wrapper, adapter, outermost.get(name))
    return injected


def inject_changes(part: nn.Module, adapter: str, changes: Mapping[str, Mapping[str, Tensor]],
                   factors: Mapping[str, float], dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """Wrap layers and norms of `part` in ChangedLayers, around the wrappers that are there.

    Args:
        changes: name of the layer -> its tensors. factors: name -> alpha / rank, where it is not 1.
        dtypes: name -> dtype that it keeps them in.

    Returns:
        The wrappers by the name of the layer.
    """
    places = {name: (module, wrappers[0] if wrappers else module) for name, module, wrappers in _tree(part)
              if name in changes}
    injected: dict[str, Any] = {}
    for name, (module, outermost) in places.items():
        injected[name] = ChangedLayer(module, adapter, changes[name], factors.get(name, 1.0), dtypes[name])
        _nest(part, name, injected[name], adapter, outermost)
    return injected


def _nest(part: nn.Module, name: str, wrapper: Any, adapter: str, below: nn.Module | None) -> None:
    """Make a new wrapper a `Wrapper` without dropout, around `below`; None if peft has placed it already."""
    from peft.tuners import lora
    kind: Any = type(wrapper)
    wrapper.__class__ = _wrapper_class(kind)
    wrapper.rows, wrapper.copies, wrapper.mixed = None, None, False
    wrapper.plain_lora = isinstance(wrapper, lora.Linear) and not wrapper.lora_variant and not any(
        wrapper.lora_bias.values())
    set_training(wrapper, adapter, False)  # new modules are in training mode
    if below is not None:
        wrapper.base_layer = below
        part.set_submodule(name, wrapper)


def remove(part: nn.Module, adapter: str) -> None:
    """Remove an adapter's wrappers; the other wrappers of its layers stay."""
    for name, module, wrappers in list(_tree(part)):
        remaining = [wrapper for wrapper in wrappers if adapter not in wrapper._get_available_adapters()]
        if len(remaining) < len(wrappers):
            for wrapper in reversed(remaining):
                wrapper.base_layer = module
                module = wrapper
            part.set_submodule(name, module)


@contextmanager
def unwrapped(part: nn.Module) -> Iterator[None]:
    """Put the plain layers of `part` in the place of their wrappers inside, as if it had no adapters."""
    wrapped = [(name, module, wrappers[0]) for name, module, wrappers in _tree(part) if wrappers]
    for name, module, _ in wrapped:
        part.set_submodule(name, module)
    try:
        yield
    finally:
        for name, _, wrapper in wrapped:
            part.set_submodule(name, wrapper)


def set_active(wrapper: Any, adapter: str, active: bool) -> None:
    """Enable or disable the adapter of a wrapper."""
    # Not by peft's `set_adapter`, which also sets `requires_grad`.
    wrapper._active_adapter = [adapter] if active else []


def set_precision(wrapper: Any, adapter: str) -> None:
    """Note whether the adapter's weights have another dtype than the wrapper's layer, which is half precision."""
    dtype = wrapper.weight.dtype
    wrapper.mixed = dtype in lora_function.HALF and any(p.dtype != dtype for p in weights(wrapper, adapter).values())


def weights(wrapper: Any, adapter: str) -> dict[str, nn.Parameter]:
    """Return an adapter's weights in a wrapper by peft's names in files, sorted: 'lora_A.weight', 'hada_w1_a', ..."""
    if isinstance(wrapper, ChangedLayer):
        return wrapper.weights()
    parameters: dict[str, nn.Parameter] = {}
    for kind in wrapper.adapter_layer_names:
        if adapter not in getattr(wrapper, kind):
            continue
        entry = getattr(wrapper, kind)[adapter]
        if isinstance(entry, nn.Parameter):
            parameters[kind] = entry
        else:
            parameters |= {f'{kind}.{n}'.replace('lora_magnitude_vector.weight', 'lora_magnitude_vector'): p
                           for n, p in entry.named_parameters()}
    return dict(sorted(parameters.items()))


def set_weights(wrapper: Any, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Set an adapter's weights, by the names of `weights`, to fp32 or fp64 copies of a file's.

    LoHa and LoKr have several forms (a whole matrix, two factors, a Tucker core); peft computes with those it has.
    """
    for kind in wrapper.adapter_layer_names:
        if isinstance(getattr(wrapper, kind), nn.ParameterDict) and adapter in getattr(wrapper, kind):
            del getattr(wrapper, kind)[adapter]
    for key, tensor in tensors.items():
        kind, _, rest = key.partition('.')
        entries = getattr(wrapper, kind)
        # peft's DoRA views a convolution's weights as matrices.
        copy = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True).contiguous()
        if isinstance(entries, nn.ParameterDict):
            entries[adapter] = nn.Parameter(copy)
        else:
            parameter = entries[adapter].get_parameter(rest or 'weight')
            assert parameter.numel() == copy.numel(), f'{key}: the reader compares widths'
            parameter.data = copy.reshape(parameter.shape)


def reset_weights(wrapper: Any, adapter: str, init: bool | str) -> None:
    """Draw an adapter's fresh weights again, in fp32: peft rounds them to the base's half precision.

    Args:
        init: peft's `init_lora_weights`, for LoRA and DoRA.
    """
    for parameter in weights(wrapper, adapter).values():
        parameter.data = parameter.data.float()
    if hasattr(wrapper, 'lora_A'):
        wrapper.reset_lora_parameters(adapter, init)
        if adapter in wrapper.lora_magnitude_vector:
            base, a, b = wrapper.get_base_layer(), wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
            wrapper.lora_magnitude_vector[adapter].update_layer(base_layer=base, lora_A=a, lora_B=b,
                                                                scaling=wrapper.scaling[adapter])
    elif hasattr(wrapper, 'oft_R'):
        wrapper.reset_oft_parameters(adapter, True)
    else:
        wrapper.reset_adapter_parameters(adapter)


def set_training(wrapper: Any, adapter: str, mode: bool) -> None:
    """Enable or disable an adapter's dropout. DoRA, LoHa and LoKr read the wrapper's own flag."""
    wrapper.training = mode
    if hasattr(wrapper, 'lora_dropout'):
        wrapper.lora_dropout[adapter].train(mode)
