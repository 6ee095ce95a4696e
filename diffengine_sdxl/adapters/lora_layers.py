"""peft's wrappers in a module of the base: where they may go, what they hold, on and off, and away again.

A wrapper stands in the place of a layer: `to_q` becomes a LoraLayer that holds the layer as `base_layer` and the
weights by the adapter's name. Every adapter has wrappers of its own, one around the other in the order of attaching, so
that no two share a flag. Here a layer is called by the name that it has without wrappers.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from diffengine_sdxl.registry import nearest
from diffengine_sdxl.structures import where

#: What peft can wrap and SDXL has.
LAYERS = (nn.Linear, nn.Conv2d)


def _is_wrapper(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    return isinstance(module, BaseTunerLayer)


def _tree(part: nn.Module) -> Iterator[tuple[str, nn.Module, list[Any]]]:
    """Every module that `part` has without wrappers: its name, itself, and its wrappers, the outermost first."""
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
    """The linear and convolution layers of `part` by name, in its order, without any wrapper."""
    return {name: module for name, module, _ in _tree(part) if isinstance(module, LAYERS)}


def layers(part: nn.Module, adapter: str) -> dict[str, Any]:
    """The wrappers that hold weights of `adapter`, by the name of what they wrap, in the part's order."""
    return {name: wrapper for name, _, wrappers in _tree(part) for wrapper in wrappers
            if adapter in wrapper._get_available_adapters()}


def find(targets: Sequence[str], parts: Mapping[str, nn.Module], adapter: str) -> dict[str, list[str]]:
    """The layers that `targets` mean: part -> names, in the part's order.

    Args:
        targets: full names ('unet.mid_block.attentions.0.proj_in'), patterns of full names ('unet.*.attn2.to_k'), or
            ends of names ('to_q', 'ff.net.0.proj').
        parts: part -> its module. adapter: whose targets they are, for errors.

    Raises:
        ValueError: an entry means no layer, or also one that belongs to another adapter.
    """
    known = [(part, name) for part, module in parts.items() for name in plain(module)]
    full = [f'{part}.{name}' for part, name in known]
    ends = [*full, *dict.fromkeys('.'.join(name.split('.')[-n:]) for name in full for n in (1, 2, 3))]
    others = [f'{part}.{name}.{inner}' for part, module in parts.items() for name, _, wrappers in _tree(module)
              for inner, _ in (wrappers[0].named_modules() if wrappers else ()) if inner]
    chosen = set()
    for target in targets:
        if caught := [name for name in others if _means(target, name)]:
            raise ValueError(f"The target '{target}' of adapter '{adapter}' would also catch '{caught[0]}', a layer "
                             f'that belongs to another adapter ({len(caught)} such). Give the ends of names (to_q) or '
                             'a pattern that ends with a layer of the base (unet.*.attn1.to_q).')
        hits = {place for place, name in zip(known, full, strict=True) if _means(target, name)}
        if not hits:
            raise ValueError(f"The target '{target}' of adapter '{adapter}' means no linear or convolution layer of "
                             f'{", ".join(parts)}.{nearest(target, ends)}')
        chosen |= hits
    return {part: [name for p, name in known if p == part and (p, name) in chosen] for part in parts}


def _means(target: str, name: str) -> bool:
    """Whether an entry of the targets means the layer of this full name."""
    if any(sign in target for sign in '*?['):
        return fnmatchcase(name, target)
    return name == target or name.endswith(f'.{target}')


def inject(part: nn.Module, config: Any, adapter: str) -> dict[str, Any]:
    """Let peft put an adapter into `part`, around what is there; nothing else in it changes.

    peft sees the plain layers alone: it cannot wrap the convolution of another kind, makes the newest adapter of a
    wrapper the only active one, and leaves a `peft_config` on the module, which warns at the next injection.

    Args:
        config: a PeftConfig whose targets are names of layers. adapter: the name of its weights.

    Returns:
        as `layers`.
    """
    from peft import inject_adapter_in_model
    grads = [(p, p.requires_grad) for p in part.parameters()]
    present = {name: wrappers[0] for name, _, wrappers in _tree(part) if wrappers}
    with unwrapped(part), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # OFT's block sizes that don't divide a width: `rank` says what becomes of them
        inject_adapter_in_model(config, part, adapter_name=adapter)
        found = layers(part, adapter)
    del part.peft_config
    for parameter, grad in grads:
        parameter.requires_grad_(grad)
    for name, wrapper in found.items():
        wrapper.rows, wrapper.forward = None, functools.partial(_forward, wrapper)
        train(wrapper, adapter, False)  # new modules are in training mode, and the base's mode doesn't change
        if name in present:
            wrapper.base_layer = present[name]
            _place(part, name, wrapper)
    return found


def remove(part: nn.Module, adapter: str) -> None:
    """Take an adapter's wrappers out; a layer that is left with none has its own place again."""
    for name, module, wrappers in list(_tree(part)):
        kept = [wrapper for wrapper in wrappers if adapter not in wrapper._get_available_adapters()]
        if len(kept) < len(wrappers):
            for wrapper in reversed(kept):
                wrapper.base_layer = module
                module = wrapper
            _place(part, name, module)


@contextmanager
def unwrapped(part: nn.Module) -> Iterator[None]:
    """Inside, `part` has its layers in their own places and under their own names, as if it had no adapters."""
    held = [(name, module, wrappers[0]) for name, module, wrappers in _tree(part) if wrappers]
    for name, module, _ in held:
        _place(part, name, module)
    try:
        yield
    finally:
        for name, _, wrapper in held:
            _place(part, name, wrapper)


def _place(part: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition('.')
    setattr(part.get_submodule(parent), leaf, module)


def switch(wrapper: Any, adapter: str, on: bool) -> None:
    """Let the adapter of a wrapper act or not."""
    # Not by peft's `set_adapter`, which also sets `requires_grad`.
    wrapper._active_adapter = [adapter] if on else []


def _forward(wrapper: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Instead of a wrapper's own forward: one that is off leaves the layer's output as it is, its dtype too.

    With `rows` (bool [B]), the adapter acts on these rows alone, whatever its kind; B is the first dimension of x.
    """
    if not wrapper.active_adapters:
        return wrapper.base_layer(x, *args, **kwargs)
    inside = type(wrapper).forward(wrapper, x, *args, **kwargs)
    return inside if wrapper.rows is None else where(wrapper.rows, inside, wrapper.base_layer(x, *args, **kwargs))


def weights(wrapper: Any, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's weights in a wrapper, by peft's names in files: 'lora_A.weight', 'hada_w1_a', ..., sorted."""
    found: dict[str, nn.Parameter] = {}
    for kind in wrapper.adapter_layer_names:
        if adapter not in getattr(wrapper, kind):
            continue
        held = getattr(wrapper, kind)[adapter]
        if isinstance(held, nn.Parameter):
            found[kind] = held
        else:
            found |= {f'{kind}.{n}'.replace('lora_magnitude_vector.weight', 'lora_magnitude_vector'): p
                      for n, p in held.named_parameters()}
    return dict(sorted(found.items()))


def put(wrapper: Any, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Set an adapter's weights, of the names that `weights` gives, to those of a file; fp32 copies, or fp64.

    LoHa and LoKr have several forms (a whole matrix, two factors, a Tucker core), and peft computes what it finds.
    """
    for kind in wrapper.adapter_layer_names:
        if isinstance(getattr(wrapper, kind), nn.ParameterDict) and adapter in getattr(wrapper, kind):
            del getattr(wrapper, kind)[adapter]
    for key, tensor in tensors.items():
        kind, _, rest = key.partition('.')
        held = getattr(wrapper, kind)
        copy = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        if isinstance(held, nn.ParameterDict):
            held[adapter] = nn.Parameter(copy)
        else:
            parameter = held[adapter].get_parameter(rest or 'weight')
            assert parameter.numel() == copy.numel(), f'{key}: the reader compares widths'
            parameter.data = copy.reshape(parameter.shape)


def renew(wrapper: Any, adapter: str, init: bool | str) -> None:
    """Draw an adapter's fresh weights once more, in fp32: peft's are rounded to the base's half precision.

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


def each(wrapper: Any, adapter: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change an adapter's weights in a wrapper in place."""
    for parameter in weights(wrapper, adapter).values():
        parameter.data = change(parameter.data)


def train(wrapper: Any, adapter: str, mode: bool) -> None:
    """Let an adapter's dropout act or not. The wrapper's own flag is read by DoRA, LoHa and LoKr."""
    wrapper.training = mode
    if hasattr(wrapper, 'lora_dropout'):
        wrapper.lora_dropout[adapter].train(mode)
