"""A processor on which no two kernels round alike, so that bitwise tests fail here if they would fail anywhere."""

import zlib
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: What libraries have several kernels for, and choose of by processor, shape and layout (ATen's names).
ROUNDED = frozenset((
    'mm', 'addmm', 'bmm', 'baddbmm', 'convolution', 'convolution_backward', 'native_layer_norm',
    'native_layer_norm_backward', 'native_group_norm', 'native_group_norm_backward', 'silu', 'silu_backward', 'gelu',
    'gelu_backward', 'sigmoid', '_softmax', '_softmax_backward_data', '_scaled_dot_product_flash_attention_for_cpu',
    '_scaled_dot_product_flash_attention_for_cpu_backward'))
#: Of these, the products of matrices.
PRODUCTS = frozenset(('mm', 'addmm', 'bmm', 'baddbmm'))


class OtherKernels(TorchDispatchMode):
    """Change the last bit of about half of the numbers that an operation of ROUNDED gives.

    Which numbers depends on the operation and on shape, layout and dtype of its inputs, as the choice of a kernel does.
    So two computations are bitwise equal inside only if they call the same operations on inputs that lie alike; on a
    real processor they may also be equal by chance, as `mm` and `bmm` often are. An fp32 product of matrices that is
    exact stays as it is, for so it is on every processor.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what torch wraps around each call otherwise costs as much as the call

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if name := _rounded(func):
            key = zlib.crc32(repr((name, [_layout(a) for a in args if isinstance(a, Tensor)])).encode())
            for i, tensor in enumerate(out if isinstance(out, tuple) else (out,)):
                # The first is the result, the others of a forward pass are its statistics.
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta and (
                        i == 0 or 'backward' in name):
                    factors = _pattern(key, tensor.shape, tensor.dtype)
                    if name in PRODUCTS and tensor.dtype == torch.float32:
                        wide = (a.double() if isinstance(a, Tensor) else a for a in args)
                        factors = factors.where(func(*wide, **(kwargs or {})) != tensor, 1.0)
                    tensor.mul_(factors)
        return out


@cache
def _rounded(func: Any) -> str:
    """The operation's name if it is of ROUNDED, else ''."""
    name, _, overload = str(func).removeprefix('aten.').partition('.')
    return name if name in ROUNDED and 'out' not in overload else ''


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    # The stride of a side of 1 says nothing.
    return tensor.dtype, *((n, s if n > 1 else 0) for n, s in zip(tensor.shape, tensor.stride(), strict=True))


@cache
def _pattern(key: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """1 or the next number above, drawn by `key`."""
    up = torch.rand(shape, generator=torch.Generator().manual_seed(key)) < 0.5
    return torch.where(up, 1 + torch.finfo(dtype).eps, 1.0).to(dtype)
