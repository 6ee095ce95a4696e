"""What is chosen by measuring on the GPU, in about a second: the order of attention kernels, the layout of images.

A run records what was chosen and takes it again when it is resumed, as another kernel rounds differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

#: Names in records -> torch's kernels of attention.
KERNELS = {'cudnn': SDPBackend.CUDNN_ATTENTION, 'flash': SDPBackend.FLASH_ATTENTION,
           'efficient': SDPBackend.EFFICIENT_ATTENTION, 'math': SDPBackend.MATH}
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
#: A function that runs another one and returns the seconds that it took on the device.
Timer = Callable[[Callable[[], Any]], float]


def measure(unet: Any, batch_size: int, timer: Timer | None = None) -> dict[str, Any]:
    """Time kernels and layouts at the sizes of `unet` and a square image of its own size.

    Args:
        unet: on a GPU, in half precision.
        batch_size: rows of a call.
        timer: None for CUDA's events, the best of three.

    Returns:
        {'attention': kernels, the fastest first, without those that this GPU cannot run; 'layout': a key of LAYOUTS}.
    """
    timer = timer or _time_on_cuda
    weight = next(unet.parameters())
    return {'attention': _order_of_kernels(unet, batch_size, weight, timer),
            'layout': _layout(unet, batch_size, weight, timer)}


@contextmanager
def applied(unet: Any, choices: Mapping[str, Any]) -> Iterator[None]:
    """Compute with what `measure` chose inside; {} changes nothing.

    Weights that train keep their layout: fused optimizers need that of their states, DDP that of its buckets.
    """
    if 'layout' in choices:
        for weight in unet.parameters():
            if weight.dim() == 4 and not weight.requires_grad:
                weight.data = weight.data.contiguous(memory_format=LAYOUTS[choices['layout']])
    if not choices.get('attention'):
        yield
        return
    with sdpa_kernel([KERNELS[name] for name in choices['attention']], set_priority=True):
        yield


def attention_shapes(unet: Any) -> list[tuple[int, int, int]]:
    """Return (heads, positions, channels of a head) of the self-attentions, one for each level that has any."""
    config, shapes = unet.config, []
    heads = config.attention_head_dim  # diffusers' name for the number of heads
    for level, (kind, channels) in enumerate(zip(config.down_block_types, config.block_out_channels, strict=True)):
        if 'CrossAttn' in kind:
            number = heads[level] if isinstance(heads, list | tuple) else heads
            shapes.append((number, (config.sample_size // 2**level) ** 2, channels // number))
    return shapes


def _order_of_kernels(unet: Any, batch_size: int, weight: Tensor, timer: Timer) -> list[str]:
    seconds: dict[str, float] = {}
    for name, kernel in KERNELS.items():
        if name == 'math':
            continue  # it writes every map to memory; the last resort of the others
        try:
            seconds[name] = sum(timer(_attend(kernel, (batch_size, *shape), keys, weight))
                                for shape in attention_shapes(unet) for keys in (shape[1], 77))
        except RuntimeError:  # torch: no available kernel
            continue
    return [*sorted(seconds, key=seconds.__getitem__), 'math']


def _attend(kernel: SDPBackend, shape: tuple[int, int, int, int], keys: int, weight: Tensor) -> Callable[[], None]:
    """Return one attention with its backward pass, as of [B, heads, L, c] to `keys` positions."""
    rows, heads, positions, channels = shape
    query, key, value = (torch.randn(rows, heads, length, channels, device=weight.device, dtype=weight.dtype,
                                     requires_grad=True) for length in (positions, keys, keys))

    def attend() -> None:
        with sdpa_kernel(kernel):
            out = functional.scaled_dot_product_attention(query, key, value)
            torch.autograd.grad(out, (query, key, value), out)
    return attend


def _layout(unet: Any, batch_size: int, weight: Tensor, timer: Timer) -> str:
    """Time a residual block of the highest resolution, forward and backward, in both layouts."""
    block, config = unet.down_blocks[0].resnets[0], unet.config
    emb = torch.randn(batch_size, block.time_emb_proj.in_features, device=weight.device, dtype=weight.dtype)
    image = torch.randn(batch_size, config.block_out_channels[0], config.sample_size, config.sample_size,
                        device=weight.device, dtype=weight.dtype, requires_grad=True)
    seconds = {}
    for name, layout in LAYOUTS.items():
        block.to(memory_format=layout)
        laid_out = image.contiguous(memory_format=layout)

        def step(x: Tensor = laid_out) -> None:
            out = block(x, emb)
            torch.autograd.grad(out, x, torch.ones_like(out))
        seconds[name] = timer(step)
    block.to(memory_format=torch.contiguous_format)
    return min(seconds, key=seconds.__getitem__)


def _time_on_cuda(work: Callable[[], Any]) -> float:
    """Return the shortest of three times, after one that warms up; in seconds."""
    times = []
    for _ in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times[1:])
