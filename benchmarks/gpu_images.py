"""Section of gpu.py: images of 30 steps with guidance, here and by diffusers' stock pipeline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_steps import peak, synchronize
from torch import Tensor

from diffengine_sdxl import SDXLInferencer, rng
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing.circles import draw_circle

PROMPT = 'a red circle on a blue ground, high quality'
#: Kind -> the name of its adapter, and its config.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    't2i': ('control', dict(type='T2IAdapter')), 'lora': ('style', dict(type='LoRA', rank=16, alpha=16)),
    'ip': ('ip', dict(type='IPAdapter', architecture='plus')), 'controlnet': ('net', dict(type='ControlNet'))}
SCALE = 5.0


def configs(base: Any, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the configs of fresh adapters, by name."""
    of_kinds = {ADAPTERS[kind][0]: dict(ADAPTERS[kind][1]) for kind in kinds}
    if 'ip' in of_kinds:
        of_kinds['ip'] |= dict(image_encoder=str(base.image_encoder()), image_encoder_subfolder=None)
    return of_kinds


@contextmanager
def model_of(base: Any, kinds: Sequence[str], precision: str, **settings: Any) -> Iterator[SDXL]:
    """Yield an SDXL with adapters that look trained; afterwards the base is as before."""
    with base.installed():
        model = SDXL(pretrained=base.source, mixed_precision=precision, adapters=configs(base, kinds), **settings)
    try:
        yield shaken(model.to(base.device).eval())
    finally:
        base.restore(model)


@torch.no_grad()
def shaken(model: SDXL) -> SDXL:
    """Add noise to the adapters' weights; a fresh LoRA or ControlNet would change nothing."""
    for name, owned in model.trainables().items():
        for i, (_, parameter) in enumerate(owned):
            with rng.fork('shaken', name, i):
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def write_adapters(base: Any, kinds: Sequence[str], number: int = 0) -> dict[str, Path]:
    """Write adapters of these kinds; return their folders by name."""
    folders = {ADAPTERS[kind][0]: base.folder / f'{kind}{number}' for kind in kinds}
    if not all(folder.exists() for folder in folders.values()):
        with model_of(base, kinds, base.precision) as model:
            for name, folder in folders.items():
                for _ in range(number):
                    shaken(model)
                model.adapters[name].save(folder)
    return folders


def conditions(base: Any, kinds: Sequence[str]) -> dict[str, Any]:
    """Return an image for each adapter that takes one."""
    image, outline, _ = draw_circle(0, base.resolution)
    return {ADAPTERS[kind][0]: image if kind == 'ip' else outline for kind in kinds if kind != 'lora'}


def stock_arguments(model: SDXL, images: dict[str, Any], steps: int, side: int) -> dict[str, Any]:
    """Return the arguments of a stock pipeline's call."""
    found: dict[str, Any] = {'height': side, 'width': side, 'num_inference_steps': steps, 'guidance_scale': SCALE}
    for name, image in images.items():
        found['ip_adapter_image' if model.adapters[name].kind.startswith('IPAdapter') else 'image'] = image
    return found


def generate(bench: Any, kinds: Sequence[str]) -> None:
    """Time images with adapters of `kinds`: ours in each mode, and stock."""
    label = ' + '.join(kinds) or 'no adapter'
    for mode in bench.compile:
        if mode != 'graph' or bench.base.device.type == 'cuda':
            bench.measure(f'{label}, compile={mode}', partial(_ours, bench, kinds, mode))
    bench.measure(f"{label}, diffusers' pipeline", partial(_stock, bench, kinds))


def _inferencer(base: Any, kinds: Sequence[str], mode: str, precision: str | None = None,
                **options: Any) -> SDXLInferencer:
    folders = write_adapters(base, kinds)
    settings = {'model.pretrained': base.source, 'model.vae': None, 'speed.compile': mode,
                'mixed_precision': precision or base.precision, **options}
    adapters = {name: {'type': config['type'], 'weights': str(folders[name]), **{
        key: config[key] for key in ('architecture', 'image_encoder', 'image_encoder_subfolder') if key in config}}
        for name, config in configs(base, kinds).items()}
    with base.installed():
        return SDXLInferencer('sdxl_text_to_image', device=str(base.device), adapters=adapters, cfg_options=settings)


def _ours(bench: Any, kinds: Sequence[str], mode: str) -> dict[str, Any]:
    base = bench.base
    inferencer = _inferencer(base, kinds, mode)
    images = conditions(base, kinds)

    def call() -> Tensor:
        result: Tensor = inferencer(PROMPT, height=base.resolution, width=base.resolution, output_type='pt', seed=0,
                                    num_inference_steps=bench.solver_steps, conditions=images)
        return result
    try:
        values = {**timed(call, base), 'vae': str(inferencer.model.vae.dtype),
                  'fell_back': base.fell_back(inferencer.model), **_compared(bench, kinds, call())}
        if 'lora' in kinds:
            folder = write_lora(base)
            begun = time.perf_counter()
            inferencer.load_adapter('style', str(folder))
            values['swap_s'] = round(time.perf_counter() - begun, 3)
            values['after_swap_s'] = round(seconds(call, base), 3)
            values |= {f'swapped_{name}': value for name, value in _compared(bench, (*kinds, 'swap'), call()).items()}
        return values
    finally:
        base.restore(inferencer.model)


def _compared(bench: Any, kinds: Sequence[str], image: Tensor) -> dict[str, Any]:
    """Compare an image with that of the first mode, which is 'off'; a graph's must be the same."""
    first = bench.images.setdefault(tuple(kinds), image)
    return {} if first is image else {'equal': torch.equal(first, image),
                                      'max_difference': round(float((first - image).abs().max()), 5)}


def write_lora(base: Any) -> Path:
    """Write another LoRA of the same rank, without a second model: its weights are the first one's, twice as large."""
    from safetensors.torch import load_file, save_file
    source, folder = base.folder / 'lora0', base.folder / 'lora1'
    for path in [p for p in source.rglob('*') if p.is_file()]:
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == '.safetensors':
            from safetensors import safe_open
            with safe_open(path, 'pt') as file:
                metadata = file.metadata()
            save_file({k: v * 2 if 'alpha' not in k else v for k, v in load_file(path).items()}, target, metadata)
        else:
            target.write_bytes(path.read_bytes())
    return folder


def _stock(bench: Any, kinds: Sequence[str]) -> dict[str, Any]:
    base = bench.base
    with model_of(base, kinds, base.precision) as model:
        pipeline = model.to_diffusers()
        # As users have it: the pipeline does not decode latents of another dtype.
        pipeline.vae.to(model.unet_weight.dtype)
        pipeline.set_progress_bar_config(disable=True)
        arguments = stock_arguments(model, conditions(base, kinds), bench.solver_steps, base.resolution)

        def call() -> Tensor:
            result: Tensor = pipeline(PROMPT, generator=torch.Generator().manual_seed(0), output_type='pt', **arguments,
                                      **pipeline.call_arguments).images
            return result
        return {**timed(call, base), 'vae': str(pipeline.vae.dtype)}


def timed(call: Callable[[], Tensor], base: Any) -> dict[str, Any]:
    """Return seconds of the first call and of later ones, and the peak of memory."""
    first = seconds(call, base)
    if base.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    later = [seconds(call, base) for _ in range(1 if base.tiny else 3)]
    return {'s': round(statistics.median(later), 3), 'first_s': round(first, 2), 'peak_gib': peak(base.device)}


def seconds(call: Callable[[], Any], base: Any) -> float:
    """Return the seconds of one call."""
    synchronize(base.device)
    begun = time.perf_counter()
    call()
    synchronize(base.device)
    return time.perf_counter() - begun
