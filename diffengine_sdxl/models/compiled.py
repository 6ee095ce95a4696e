"""The UNet's blocks compiled, and their activations recomputed.

Each BasicTransformerBlock and ResnetBlock2D is compiled in place. Blocks of one shape share their code, so SDXL's UNet
takes 11 graphs of a kind (with gradients, or without) and size, whatever adapters there are: 3 for 70 transformer
blocks, 8 for 17 resnets. What a block reads must not depend on which block it is: neither names nor a `forward` of its
own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from mmengine.logging import print_log
from torch import nn

from diffengine_sdxl.errors import one_of

COMPILED = (BasicTransformerBlock, ResnetBlock2D)
CHECKPOINTING = ('off', 'blocks', 'full')
#: Graphs that all blocks of a process may have. dynamo counts them by the code object, which all modules share, and
#: allows 8. A resolution adds 11, sampling between training steps as many, an adapter's window or second scale 3.
MAX_GRAPHS = 256


def compile_blocks(network: Any, backend: str | Callable[..., Any] = 'inductor') -> Callable[[], None]:
    """Compile the blocks of a UNet or ControlNet in place, at their first call in each size of image.

    Sizes are static: several buckets have a set of graphs each, which is faster than code for any size. A block whose
    compilation fails, and all after it, compute as they did, after one warning.

    Args:
        network: on its device, with all adapters attached.
        backend: of `torch.compile`.

    Returns:
        A function that undoes it.
    """
    compiler = _Compiler(backend)
    blocks = [module for module in network.modules() if isinstance(module, COMPILED)]
    for block in blocks:
        # torch's own slot: state dicts, copies and pickles leave it out, and gradient checkpointing calls it too.
        block._compiled_call_impl = functools.partial(compiler.call, block, torch.compile(
            block._call_impl, dynamic=False, backend=compiler.backend))

    def undo() -> None:
        for block in blocks:
            block._compiled_call_impl = None
    return undo


class _Compiler:
    """Calls compiled blocks, or the blocks themselves once compiling has failed."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        self._backend = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        self.failed = False

    def backend(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        """Compile the backward pass with the forward pass: it would fail where nothing can catch it."""
        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
            return self._backend(graph, inputs)

    def call(self, block: nn.Module, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `block`."""
        if not self.failed:
            config: Any = torch._dynamo.config
            if config.recompile_limit < MAX_GRAPHS:  # settings are a thread's, and backward passes have their own
                config.recompile_limit = MAX_GRAPHS
            try:
                return compiled(*args, **kwargs)
            # Raised before the block has computed anything.
            except torch._dynamo.exc.TorchDynamoException as error:
                self.failed = True
                cause = getattr(error, 'inner_exception', error)
                reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), '')
                print_log("The blocks of the UNet cannot be compiled and compute as with speed.compile='off' "
                          f'({type(cause).__name__}: {reason})', logger='current', level=logging.WARNING)
        return block._call_impl(*args, **kwargs)


def set_checkpointing(network: Any, mode: str) -> None:
    """Recompute activations of a UNet or ControlNet in the backward pass; the gradients are bitwise the same.

    Counted for SDXL's UNet with a LoRA of rank 16 in all attentions at 1024 px (bf16, flash attention):

    | mode | saved, GiB an image | recomputed, of a training step's FLOPs |
    |---|---|---|
    | 'off' | 5.22 | 0 |
    | 'blocks' | 2.51 | 17 % |
    | 'full' | 0.45 | 35 % |

    'blocks' recomputes the transformer blocks of the highest resolution, which save most for a FLOP (1.17 GiB a TFLOP;
    those of the lower 1.01, resnets 0.43), and those of the up blocks.

    Args:
        mode: 'off', 'blocks' or 'full', which is diffusers' `enable_gradient_checkpointing`.
    """
    one_of('checkpointing', mode, CHECKPOINTING)
    if mode == 'off':
        network.disable_gradient_checkpointing()
        return
    network.enable_gradient_checkpointing()
    if mode == 'blocks':
        stacks = [m for m in network.modules() if isinstance(m, Transformer2DModel)]
        width = min((stack.inner_dim for stack in stacks), default=0)
        for name, module in network.named_modules():
            if hasattr(module, 'gradient_checkpointing'):
                module.gradient_checkpointing = isinstance(module, Transformer2DModel) and (
                    module.inner_dim == width or name.startswith('up_blocks'))
