"""The devices that a training may be planned for: figures of their sheets, or rates that are measured here."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from diffengine_sdxl.commands.plan.counter import Rates, counted
from diffengine_sdxl.errors import UserError, count_of, did_you_mean

#: What a training step reaches of a sheet's bandwidth, matrix products and, of these, attention: about what an H100
#: does (2.7 of 3.35 TB/s, 600 and 380 of 989 TFLOP/s).
COPY, MATMUL, ATTENTION = 0.8, 0.6, 0.38
#: Seconds of the shortest kernel, and seconds that Python takes to launch one: of a usual host.
LAUNCH, HOST = 2.5e-6, 12e-6
#: The part of a GPU's memory that PyTorch can have: CUDA's context and fragments take the rest.
USABLE = 0.92
#: Bytes of the workspaces of cuBLAS and cuDNN on a GPU.
LIBRARIES = 2**28


class Sheet(NamedTuple):
    """A vendor's figures: GiB of memory, TB/s, and dense TFLOP/s in half precision, in TF32 (0: none) and in fp32."""

    memory: float
    copy: float
    half: float
    tf32: float
    full: float
    has_bf16: bool = True


#: Of SXM boards where there are several; of RTX cards with sums in fp32.
SHEETS = {
    'B200': Sheet(179, 7.7, 2250, 1125, 75), 'H200': Sheet(140, 4.8, 989, 495, 67),
    'H100': Sheet(80, 3.35, 989, 495, 67),
    'A100': Sheet(80, 2.04, 312, 156, 19.5), 'A100-40GB': Sheet(40, 1.56, 312, 156, 19.5),
    'L40S': Sheet(45, 0.864, 362, 183, 91.6), 'L4': Sheet(22.5, 0.3, 121, 60, 30.3),
    'A10G': Sheet(22.5, 0.6, 70, 35, 35), 'A6000': Sheet(48, 0.768, 155, 77, 38.7),
    'RTX5090': Sheet(32, 1.79, 209, 105, 105), 'RTX4090': Sheet(24, 1.01, 165, 82.6, 82.6),
    'RTX4080': Sheet(16, 0.717, 97.5, 48.7, 48.7), 'RTX3090': Sheet(24, 0.936, 71, 35.6, 35.6),
    'RTX3060': Sheet(12, 0.36, 25.5, 12.7, 12.7), 'V100': Sheet(32, 0.9, 125, 0, 15.7, False),
    'T4': Sheet(15, 0.32, 65, 0, 8.1, False)}


@dataclass(frozen=True)
class Device:
    """What a training is planned for.

    Attributes:
        name: for people.
        type: 'cuda' or 'cpu'.
        memory: bytes that a process may have; of a CPU, the machine's.
        rates: what it does in a second.
        measured: whether the rates were measured.
        has_bf16: whether it computes in bf16.
    """

    name: str
    type: str
    memory: int
    rates: Rates
    measured: bool
    has_bf16: bool = True


def find(name: str | None, tf32: bool = False) -> Device:
    """Return a device by its name; None: this machine's GPU, or else its CPU.

    Args:
        tf32: whether fp32 matrix products may compute in TF32 (`env_cfg.allow_tf32`).

    Raises:
        UserError: the name is unknown, or this machine has no GPU.
    """
    if name is None or name.lower() in ('cpu', 'cuda', 'gpu'):
        kind = ('cuda' if torch.cuda.is_available() else 'cpu') if name is None else name.lower().replace('gpu', 'cuda')
        if kind == 'cuda' and not torch.cuda.is_available():
            raise UserError(f"--device {name}: this machine has no GPU that PyTorch finds. Name one, such as "
                            '--device H100.')
        return _this(torch.device(kind), tf32)
    known = {key.lower().replace('-', ''): key for key in SHEETS}
    key = known.get(name.lower().replace('-', '').replace('_', '').replace(' ', ''))
    if key is None:
        raise UserError(f"--device '{name}' is unknown.{did_you_mean(name, list(SHEETS))} Known are cpu, cuda (this "
                        f"machine's), {', '.join(SHEETS)}.")
    sheet = SHEETS[key]
    full = sheet.tf32 if tf32 and sheet.tf32 else sheet.full
    rates = Rates(copy=COPY * sheet.copy * 1e12, half=MATMUL * sheet.half * 1e12, full=MATMUL * full * 1e12,
                  attention=ATTENTION * sheet.half * 1e12, launch=LAUNCH, host=HOST)
    return Device(key, 'cuda', int(USABLE * sheet.memory * 2**30), rates, False, sheet.has_bf16)


def _this(device: torch.device, tf32: bool) -> Device:
    """Measure this machine's device for about two seconds."""
    is_cuda = device.type == 'cuda'
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        rates = probe(device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    if is_cuda:
        memory = int(USABLE * torch.cuda.get_device_properties(device).total_memory)
        return Device(torch.cuda.get_device_name(device), 'cuda', memory, rates, True, torch.cuda.is_bf16_supported())
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    threads = count_of(torch.get_num_threads(), 'thread', 'threads')
    return Device(f'CPU of this machine, {threads}', 'cpu', memory, rates, True)


def probe(device: torch.device, seconds: float = 0.3) -> Rates:
    """Measure matrix products, copies, attention and the host's part of a kernel on a device, each for `seconds`."""
    is_cuda = device.type == 'cuda'
    side, positions = (8192, 4096) if is_cuda else (384, 256)

    def products(dtype: torch.dtype) -> float:
        a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
        return 2 * side**3 / duration(lambda: a @ b, device, seconds)

    def attention() -> float:
        dtype = torch.bfloat16 if is_cuda else torch.float32
        q = torch.ones(4, 10, positions, 64, device=device, dtype=dtype)
        return 4 * 40 * positions**2 * 64 / duration(
            lambda: functional.scaled_dot_product_attention(q, q, q), device, seconds)
    source = torch.ones(2**28 if is_cuda else 2**22, device=device)
    target = torch.empty_like(source)
    # A matrix product of a step has other shapes than the largest one; attention's backward pass is slower.
    return Rates(copy=2 * source.nbytes / duration(lambda: target.copy_(source), device, seconds),
                 half=0.75 * products(torch.bfloat16), full=0.75 * products(torch.float32),
                 attention=0.75 * attention(), launch=LAUNCH if is_cuda else 0.0, host=_host(device, seconds))


def _host(device: torch.device, seconds: float) -> float:
    """Return the host's seconds for each kernel: of a layer's forward and backward pass that computes next to nothing.

    So modules' and autograd's part counts, as in a step.
    """
    def layer_pass(where: torch.device) -> Callable[[], None]:
        layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True, device=where)
        x = torch.zeros(1, 4, 8, device=where)
        return lambda: layer(x).sum().backward()
    with counted() as counter:
        layer_pass(torch.device('meta'))()
    return duration(layer_pass(device), device, seconds) / counter.kernels


def duration(work: Callable[[], Any], device: torch.device, seconds: float = 0.3) -> float:
    """Return the seconds of one call, the median of as many as take about `seconds`."""
    times: list[float] = []
    while sum(times[1:]) < seconds or len(times) < 4:
        begun = time.perf_counter()
        work()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])  # the first one warms up
