"""Count kernels, bytes and saved activations of a training step of full-size SDXL, on torch's meta device.

    python benchmarks/count.py [--kinds t2i lora ip controlnet] [--batch-sizes 1 4] [--checkpointing off blocks full]

Nothing is computed, so no figure here was measured. A kernel is an ATen operation that is not a view; each is taken to
read its inputs and write its outputs once, and to last the longest of bytes / 2.7 TB/s, FLOP / 600 TFLOP/s (380 in
attention) and 2.5 us, about what an H100 does. Attention counts as flash attention. Not counted: layout copies inside
libraries, workspaces, the allocator's fragments, the optimizer's kernels. Autocast computes by CUDA's rules.
"""

from __future__ import annotations

import argparse
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from diffengine_sdxl.adapters import controlnet
from diffengine_sdxl.adapters.controlnet import ControlNet
from diffengine_sdxl.loading import base as loading
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.structures import Batch

#: Bytes and FLOP a second, and seconds of the shortest kernel.
COPY, MATMUL, ATTENTION, LAUNCH = 2.7e12, 600e12, 380e12, 2.5e-6
ADAPTERS: dict[str, dict[str, Any]] = {
    'none': {}, 't2i': dict(adapter=dict(type='T2IAdapter')), 'lora': dict(style=dict(type='LoRA', rank=16, alpha=16)),
    'ip': dict(ip=dict(type='IPAdapter', architecture='plus', image_encoder='ENCODER', image_encoder_subfolder=None)),
    'controlnet': dict(control=dict(type='ControlNet'))}
CHECKPOINT = torch.utils.checkpoint.checkpoint
#: Operations that only make or describe a tensor.
FREE = ('aten.empty', 'aten.new_empty', 'aten.detach', 'aten.lift_fresh', 'aten._unsafe_view', 'aten._reshape_alias',
        'aten.is_same_size', 'aten.alias', 'aten.sym_', 'prim.')
#: CUDA's autocast: what computes in half precision, and what in fp32.
HALF = {functional.linear, functional.conv2d, torch.conv2d, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm,
        Tensor.matmul, Tensor.__matmul__, functional.scaled_dot_product_attention, torch.addbmm}
FULL = {functional.layer_norm, torch.layer_norm, functional.group_norm, torch.group_norm, functional.softmax,
        torch.softmax, Tensor.softmax, functional.mse_loss, Tensor.pow, torch.pow, torch.exp, torch.rsqrt}


class Counter(TorchDispatchMode):
    """Count what runs inside.

    Attributes:
        kernels, bytes, seconds, flop: totals; seconds are estimated.
        live, peak: bytes of the tensors made inside that are alive, and the most of them at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = self.flop = self.live = self.peak = 0
        self.seconds = 0.0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.device.type == 'meta']
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.device.type == 'meta']
        known = {t.untyped_storage()._cdata for t in inputs}
        for tensor in outputs:
            if tensor.untyped_storage()._cdata not in known:
                self._track(tensor)
        if (inputs or outputs) and not self._is_free(func):
            self._count(func, args, kwargs, out, inputs, outputs)
        return out

    @staticmethod
    def _is_free(func: Any) -> bool:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        return views or str(func).startswith(FREE)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        num_bytes = sum(t.numel() * t.element_size() for t in {id(t): t for t in [*inputs, *outputs]}.values())
        formula = flop_registry.get(func._overloadpacket)
        flop = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        rate = ATTENTION if 'attention' in str(func) else MATMUL
        self.kernels += 1
        self.bytes += num_bytes
        self.flop += flop
        self.seconds += max(num_bytes / COPY, flop / rate, LAUNCH)

    def _track(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: Any) -> None:
            del self._storages[key]
            self.live -= size
        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def flash(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    """Compute attention as flash attention does; the meta device would write out the maps."""
    assert kwargs.get('attn_mask') is None
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return out


class Autocast(TorchFunctionMode):
    """CUDA's autocast on the meta device, which has none: weights are cast once, and norms compute in fp32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self._weights = dtype, {}  # type: torch.dtype, dict[int, Tensor]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = self.dtype if func in HALF else torch.float32 if func in FULL else None
        if dtype is not None:
            args, kwargs = ([self._cast(a, dtype) for a in args],
                            {k: self._cast(v, dtype) for k, v in (kwargs or {}).items()})
        return func(*args, **(kwargs or {}))

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad and dtype != torch.float32):
            return value.to(dtype)
        if id(value) not in self._weights:
            self._weights[id(value)] = value.to(dtype)
        return self._weights[id(value)]


def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoint `function`, which is recomputed under the Autocast that it ran in; torch knows its own only."""
    modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Autocast)]

    def run(*inputs: Any, **named: Any) -> Any:
        if not modes or any(isinstance(mode, Autocast) for mode in _get_current_function_mode_stack()):
            return function(*inputs, **named)
        with Autocast(modes[-1].dtype):
            return function(*inputs, **named)
    return CHECKPOINT(run, *args, **kwargs)


@contextmanager
def on_meta(encoder: str | None = None) -> Iterator[Callable[..., SDXL]]:
    """Yield a function (kind, settings) that builds full-size SDXL in bf16 on the meta device."""
    def autocast(model: SDXL, enabled: bool) -> Any:
        return Autocast(torch.bfloat16) if enabled else mock.MagicMock()

    def build(kind: str, **settings: Any) -> SDXL:
        adapters = {name: {k: encoder if v == 'ENCODER' else v for k, v in config.items()}
                    for name, config in ADAPTERS[kind].items()}
        with torch.device('meta'):
            dtypes = {name: torch.float32 if name == 'vae' else torch.bfloat16 for name in loading.MODULES}
            parts = loading.load_components(None, None, None, None, dtypes, 0)
        with mock.patch.object(loading, 'load_components', lambda *_, **__: dict(parts)):
            model = SDXL(mixed_precision='bf16', adapters=adapters, objective=dict(type='Denoise'), **settings)
        return model.to('meta').train()

    attach = ControlNet.attach

    def attach_on_meta(self: ControlNet, model: Any) -> None:
        with torch.device('meta'):
            attach(self, model)

    with mock.patch.object(SDXL, 'autocast', autocast), mock.patch.object(controlnet, '_copy_encoder'), \
            mock.patch.object(ControlNet, 'attach', attach_on_meta), \
            mock.patch.object(torch.utils.checkpoint, 'checkpoint', checkpointed):
        yield build


def inputs(model: SDXL, num: int, side: int = 1024) -> Batch:
    """Return cached inputs of `num` samples on the meta device; what draws depend on is on the CPU."""
    meta: dict[str, Any] = {'device': 'meta', 'dtype': torch.bfloat16}
    return Batch(
        text=[''] * num, key=[str(i) for i in range(num)], epoch=torch.zeros(num).long(), seed=torch.zeros(num).long(),
        time_ids=torch.zeros(num, 6, device='meta'), latents=torch.zeros(num, 4, side // 8, side // 8, device='meta'),
        text_embeds=torch.zeros(num, 77, 2048, **meta), pooled=torch.zeros(num, 1280, **meta),
        conditions={'conditioning_image': torch.zeros(num, 3, side, side, device='meta'),
                    'reference_embeds': torch.zeros(num, 1, 257, 1280, **meta)})


def step(model: SDXL, batch: Batch) -> dict[str, float]:
    """Count one loss and its backward pass: kernels, GB moved, estimated ms, TFLOP, GiB saved and GiB at the peak."""
    parameters = [p for owned in model.trainables().values() for _, p in owned]
    # Patched rather than in a TorchFunctionMode: checkpointing recomputes in another thread, which has none.
    with Counter() as counter, mock.patch.object(functional, 'scaled_dot_product_attention', flash):
        loss = model(batch, mode='loss')['loss']
        saved = counter.live
        loss.backward()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    frozen_unet = sum(p.numel() * p.element_size() for p in model.unet.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters)
    assert all(p.grad is not None for p in parameters), 'every trained weight gets a gradient'
    return {'kernels': counter.kernels, 'gb': counter.bytes / 1e9, 'ms': counter.seconds * 1e3,
            'tflop': counter.flop / 1e12, 'saved_gib': saved / 2**30, 'peak_gib': counter.peak / 2**30,
            'weights_gib': weights / 2**30, 'unet_gib': frozen_unet / 2**30, 'adamw_gib': 2 * trained / 2**30}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kinds', nargs='+', default=['t2i', 'lora', 'ip', 'controlnet'], choices=list(ADAPTERS)[1:])
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=[1, 4])
    parser.add_argument('--checkpointing', nargs='+', default=['off'], choices=('off', 'blocks', 'full'))
    parser.add_argument('--resolution', type=int, default=1024)
    args = parser.parse_args()
    print('| step | batch | checkpointing | kernels | GB moved | ms, estimated | TFLOP an image | saved GiB an image | '
          'peak GiB: step + AdamW + all weights | with the UNet and the adapter only |\n' + '|---' * 10 + '|')
    with tempfile.TemporaryDirectory() as folder, on_meta(write_encoder(folder)) as build:
        for kind in args.kinds:
            model = build(kind)
            for mode in args.checkpointing:
                checkpoint(model, mode)
                for num in args.batch_sizes:
                    counts = step(model, inputs(model, num, args.resolution))
                    model.zero_grad(set_to_none=True)
                    extra = counts['peak_gib'] + counts['adamw_gib']
                    base = sum(p.numel() * p.element_size() for part in ('vae', 'text_encoder', 'text_encoder_2')
                               for p in getattr(model, part).parameters()) / 2**30
                    encoders = sum(p.numel() * p.element_size() for p in model.shared_encoders.parameters()) / 2**30
                    print(f'| {kind} | {num} | {mode} | {counts["kernels"]:,} | {counts["gb"]:.0f} | '
                          f'{counts["ms"]:.0f} | {counts["tflop"] / num:.1f} | {counts["saved_gib"] / num:.2f} | '
                          f'{extra + counts["weights_gib"]:.1f} | '
                          f'{extra + counts["weights_gib"] - base - encoders:.1f} |', flush=True)


def checkpoint(model: SDXL, mode: str) -> None:
    """Set the checkpointing of a model's UNet."""
    from diffengine_sdxl.models.compiled import set_checkpointing
    set_checkpointing(model.unet, mode)


def write_encoder(folder: str) -> str:
    """Write an image encoder of one layer and ViT-H's width: embeddings are given, so that it only has to be there."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    settings = CLIPVisionConfig(hidden_size=1280, intermediate_size=64, num_hidden_layers=1, num_attention_heads=16,
                                patch_size=14, image_size=224, projection_dim=1024)
    CLIPVisionModelWithProjection(settings).save_pretrained(folder)
    return folder


if __name__ == '__main__':
    main()
