"""Sections of gpu.py: the card's own rates, and training steps of each kind beside diffusers' recipe."""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from recipe import Recipe
from safetensors import safe_open
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from workbench import NUM_ROWS, Workbench

ROOT = str(Path(__file__).resolve().parents[1])
#: TFLOP of a training step for one image at 1024 px from cached inputs, counted by benchmarks/count.py.
TFLOP = {'t2i': 15.2, 'lora': 14.5, 'ip': 14.4, 'controlnet': 20.4}
#: Steps before the timed ones: the guard of the first steps, which waits for the device, and the allocator's growth.
WARM_UP = 5
#: Batch, heads, queries, keys of SDXL's attentions at 1024 px; the last two are those of an image with guidance.
ATTENTIONS = [(8, 10, 4096, 4096), (8, 20, 1024, 1024), (8, 10, 4096, 77), (2, 10, 4096, 4096), (2, 20, 1024, 1024)]


def seconds_of(work: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Return the seconds of a call, on average."""
    work()
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - begun) / repeats


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def peak(device: torch.device) -> float | None:
    """Return the peak of allocated memory since the last reset, in GiB."""
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == 'cuda' else None


def matmul_rate(bench: Any) -> float:
    """Return the TFLOP/s of a matrix product in bf16; measured once."""
    if bench.matmul is None:
        size, device = 256 if bench.base.tiny else 8192, bench.base.device
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        bench.matmul = 2 * size**3 / seconds_of(lambda: a @ b, device) / 1e12
    return float(bench.matmul)


def rates(bench: Any) -> None:
    """Measure matrix products, copies, the launch of a kernel, and attention by each backend."""
    bench.measure('matmul bf16, TFLOP/s', lambda: {'value': matmul_rate(bench)})
    device, num = bench.base.device, 2**16 if bench.base.tiny else 2**28
    x = torch.empty(num, device=device, dtype=torch.float32)

    def copies() -> dict[str, float]:
        y, host = torch.empty_like(x), torch.empty(num // 8)
        values = {'device_tb_s': 2 * x.nbytes / seconds_of(lambda: y.copy_(x), device) / 1e12,
                  'pageable_gb_s': host.nbytes / seconds_of(lambda: x[:num // 8].copy_(host), device) / 1e9}
        if device.type == 'cuda':
            pinned = host.pin_memory()
            values['pinned_gb_s'] = pinned.nbytes / seconds_of(
                lambda: x[:num // 8].copy_(pinned, non_blocking=True), device) / 1e9
        return values
    bench.measure('copies', copies)
    small = torch.zeros(8, device=device)
    bench.measure('launch of a kernel, us', lambda: {'value': 1e6 * seconds_of(lambda: small.add_(1), device, 500)})
    for shape in ATTENTIONS[:1] if bench.base.tiny else ATTENTIONS:
        bench.measure('attention, ms forward, ms with backward', partial(_attention, bench, shape), shape=str(shape))


def _attention(bench: Any, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    device, (batch, heads, queries, keys) = bench.base.device, shape
    if bench.base.tiny:
        batch, heads, queries, keys = 1, 1, 64, 64
    q, k, v = (torch.randn(batch, heads, n, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
               for n in (queries, keys, keys))
    found: dict[str, Any] = {}
    for name in ('FLASH_ATTENTION', 'CUDNN_ATTENTION', 'EFFICIENT_ATTENTION'):
        def forward() -> Any:
            return functional.scaled_dot_product_attention(q, k, v)

        def both() -> None:
            forward().sum().backward()
        try:
            with sdpa_kernel([getattr(SDPBackend, name)]):
                found[name.lower()] = [round(1e3 * seconds_of(work, device), 3) for work in (forward, both)]
        except RuntimeError:  # not on this device
            found[name.lower()] = None
    return found


class Meter(Hook):
    """Time the steps of a real training after its warm-up, then count its waits, then profile one step.

    Each boundary is before a step, with its batch in hand: between two of them lies all that a step does, the loader,
    logging and hooks included.
    """

    priority = 'VERY_LOW'

    def __init__(self, device: torch.device, steps: int, profile: Path | None = None, warm_up: int = WARM_UP) -> None:
        self.device, self.steps, self.profile_path = device, steps, profile
        self.begin, self.end = warm_up, warm_up + steps
        self.values: dict[str, Any] = {}
        self._warnings: Any = None
        self._profile: Any = None

    @property
    def max_iters(self) -> int:
        """Steps that the training needs."""
        return self.end + 2

    def before_train(self, runner: Any) -> None:
        """Begin the first step's time, which has the compilation."""
        self._clock = time.perf_counter()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Note a boundary."""
        if batch_idx == 1:
            synchronize(self.device)
            self.values['first_s'] = round(time.perf_counter() - self._clock, 2)
        if batch_idx in (self.begin, self.end):
            synchronize(self.device)
            now = time.perf_counter()
            if batch_idx == self.end:
                self.values['ms'] = round(1e3 * (now - self._clock) / self.steps, 2)
                self.values['peak_gib'] = peak(self.device)
            elif self.device.type == 'cuda':
                torch.cuda.reset_peak_memory_stats()
            self._clock = now
        if self.device.type == 'cuda' and batch_idx == self.end:
            self._count_waits()
        elif self.device.type == 'cuda' and batch_idx == self.end + 1:
            self._stop_counting()
            self._start_profile()

    def after_train(self, runner: Any) -> None:
        """Write the profile; a profiler that fails does not cost the times."""
        self.values |= {'fell_back': Workbench.fell_back(runner.bare_model), 'chosen': runner.measured}
        if self._profile is not None:
            try:
                self._write_profile()
            except Exception as error:
                self.values['profile'] = f'{type(error).__name__}: {error}'[:200]

    def _write_profile(self) -> None:
        synchronize(self.device)
        self._profile.stop()
        events = self._profile.key_averages()
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
        self.values['gpu_ms'] = round(sum(e.self_device_time_total for e in kernels) / 1e3, 2)
        self.values['kernels'] = sum(e.count for e in kernels)
        self.profile_path.write_text(events.table(sort_by='self_cuda_time_total', row_limit=50,
                                                  max_name_column_width=100))

    def _count_waits(self) -> None:
        self._warnings = warnings.catch_warnings(record=True)
        self._seen = self._warnings.__enter__()
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')

    def _stop_counting(self) -> None:
        torch.cuda.set_sync_debug_mode('default')
        self._warnings.__exit__(None, None, None)
        places = Counter(f'{w.filename.removeprefix(ROOT + "/")}:{w.lineno}' for w in self._seen
                         if 'called a synchronizing' in str(w.message))
        self.values |= {'waits': sum(places.values()), 'waits_at': dict(places)}

    def _start_profile(self) -> None:
        from torch.profiler import ProfilerActivity, profile
        if self.profile_path is not None:
            synchronize(self.device)
            self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self._profile.start()


def training(bench: Any, kind: str) -> None:
    """Measure steps of a kind: ours without and with compilation, diffusers' recipe, and both from images."""
    for size in bench.batch_sizes:
        for mode in [m for m in bench.compile if m != 'graph']:
            bench.measure(f'{kind}, compile={mode}', partial(_ours, bench, kind, size, mode), batch=size)
        if kind != 'ip':
            bench.measure(f"{kind}, diffusers' recipe, cached", partial(_recipe, bench, kind, size), batch=size)
    if kind != 'ip':
        size = bench.batch_sizes[0]
        bench.measure(f"{kind}, diffusers' recipe as it is", partial(_recipe, bench, kind, size, cached=False),
                      batch=size)
        bench.measure(f'{kind}, from images', partial(_ours, bench, kind, size, 'off', cached=False), batch=size)


def _rate(bench: Any, kind: str, size: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Add images a second, and the share of what the card's matrix products allow."""
    images = 1e3 * size / values['ms']
    limit = None if bench.base.tiny else matmul_rate(bench) / TFLOP[kind]
    share = None if limit is None else round(images / limit, 3)
    return {'images_s': round(images, 2), 'share_of_limit': share, **values}


def _ours(bench: Any, kind: str, size: int, mode: str, cached: bool = True) -> dict[str, Any]:
    base, cache = bench.base, '' if cached else '_images'
    meter = Meter(base.device, bench.steps, bench.out / f'profile_{kind}_{mode}_{size}{cache}.txt',
                  1 if base.tiny else WARM_UP)
    with base.runner(base.config(kind, size, meter.max_iters, cached, mode), [meter]) as runner:
        runner.train()
    return _rate(bench, kind, size, meter.values)


def _recipe(bench: Any, kind: str, size: int, cached: bool = True) -> dict[str, Any]:
    """Time diffusers' recipe; the UNet of a LoRA is a copy, as its layers stay in it."""
    base = bench.base
    base.free()
    recipe = build_recipe(base, kind, cached)
    batches = loader(base, kind, size, cached)
    for _ in range(1 if base.tiny else 3):
        recipe.step(next(batches))
    synchronize(base.device)
    if base.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for _ in range(bench.steps):
        recipe.step(next(batches))
    synchronize(base.device)
    values = {'ms': round(1e3 * (time.perf_counter() - begun) / bench.steps, 2), 'peak_gib': peak(base.device)}
    batches.close()
    return _rate(bench, kind, size, values)


def build_recipe(base: Any, kind: str, cached: bool = True) -> Recipe:
    """Return diffusers' recipe on a base, with its networks in fp32."""
    from diffusers import ControlNetModel, T2IAdapter
    parts = base.parts
    unet, network, device = parts['unet'], None, base.device
    if kind == 'lora':
        unet = copy.deepcopy(unet)
    elif kind == 't2i':
        widths = tuple(unet.config.block_out_channels)
        network = T2IAdapter(in_channels=3, channels=(*widths, widths[-1]), num_res_blocks=2,
                             downscale_factor=2 * base.vae_factor, adapter_type='full_adapter_xl').to(device)
    else:
        with torch.device(device):
            network = ControlNetModel.from_unet(unet).float()
    encoders = [parts['text_encoder'], parts['text_encoder_2']] if kind == 'lora' and not cached else None
    return Recipe(kind, unet, parts['scheduler'], network, None if base.precision == 'no' else base.dtype,
                  None if cached else parts['vae'], encoders)


class CacheRows(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows of the cache that ours reads, by a plain reader: control images become fp32 as the scripts' do."""

    def __init__(self, folder: Path) -> None:
        self.path, self.file = folder / '0.safetensors', None  # type: Path, Any

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.file is None:
            self.file = safe_open(self.path, 'pt')
        row = {name: self.file.get_slice(name)[index] for name in list(self.file.keys())}
        return {name: value.float() / 255 if value.dtype == torch.uint8 else value for name, value in row.items()}


def loader(base: Any, kind: str, size: int, cached: bool = True) -> Iterator[dict[str, Any]]:
    """Yield batches without end, in torch's own loader: of the cache, or with images in memory."""
    data: Any = CacheRows(base.cache(kind))
    if not cached:
        images, ids = torch.rand(3, base.resolution, base.resolution) * 2 - 1, torch.full((77,), 7)
        data = [{**row, 'img': images, 'ids': ids, 'ids_2': ids} for row in map(data.__getitem__, range(NUM_ROWS))]
    batches = torch.utils.data.DataLoader(data, batch_size=size, shuffle=True, drop_last=True,
                                          num_workers=0 if base.tiny else 4, persistent_workers=not base.tiny)
    while True:
        yield from batches
