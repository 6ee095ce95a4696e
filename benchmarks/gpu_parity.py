"""Section of gpu.py: what must hold on a device as it does on a CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from gpu_images import PROMPT, _inferencer, conditions, model_of, stock_arguments
from gpu_steps import peak
from mmengine.hooks import Hook
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.request_batch import request_batch
from diffengine_sdxl.request import Request

#: Solver steps of a comparison, and the training step that gets NaN.
STEPS, BAD = 3, 2


def parity(bench: Any) -> None:
    """Compare with stock pipelines in fp32 and half precision; offload; a VAE that overflows; a loss that is NaN."""
    for kinds in ((), ('t2i',), ('lora',), ('ip',), ('controlnet',)):
        for precision in ('no', bench.base.precision):
            bench.measure(f'{" ".join(kinds) or "no adapter"}, latents of ours and stock',
                          partial(_stock, bench, kinds, precision), precision=precision)
    bench.measure('VAE in fp16 that overflows: decoded in fp32', partial(_vae_guard, bench))
    bench.measure('NaN in a training step', partial(_nan, bench))
    bench.measure('offload', partial(_offload, bench))


def _stock(bench: Any, kinds: Sequence[str], precision: str) -> dict[str, Any]:
    """Make an image's latents here and by the stock pipeline on the same weights."""
    base = bench.base
    sampler = dict(type='Sampler', num_inference_steps=STEPS, guidances=[dict(type='CFG', scale=5.0)])
    with model_of(base, kinds, precision, sampler=sampler) as model:
        images, side = conditions(base, kinds), base.resolution
        request = Request(prompt=PROMPT, seed=0, conditions=images)
        with torch.no_grad(), model.frozen():
            ours = model.sampler(model, request_batch(model, [request], (side, side)))
            pipeline = model.to_diffusers()
            pipeline.set_progress_bar_config(disable=True)
            stock = pipeline(PROMPT, generator=torch.Generator().manual_seed(0), output_type='latent',
                             **stock_arguments(model, images, STEPS, side), **pipeline.call_arguments).images
        difference = (ours.float() - stock.float()).abs()
        return {'equal': torch.equal(ours.to(stock), stock), 'max_difference': float(difference.max()),
                'of_deviation': float(stock.float().std())}


def _vae_guard(bench: Any) -> dict[str, Any]:
    """Decode latents that overflow a VAE in fp16."""
    base = bench.base
    with model_of(base, (), 'no') as model:
        side = base.resolution // base.vae_factor
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            latents = torch.randn(1, 4, side, side).to(base.device) * 1e6
        expected = model.decode(latents)
        model.vae = copy.deepcopy(model.vae).half()  # the base's keeps its bits, which caches are bound to
        model.vae.register_to_config(force_upcast=False)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            images = model.decode(latents)
    return {'warned': any('overflows' in str(w.message) for w in seen), 'finite': bool(torch.isfinite(images).all()),
            'max_difference': float((images - expected).abs().max())}


class Poison(Hook):
    """Put NaN into the latents of one step, and keep the weights from before it."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Put it in."""
        if batch_idx == BAD:
            self.before = {k: v.detach().clone() for k, v in runner.bare_model.state_dict().items()}
            latents = data_batch['latents'] if isinstance(data_batch, dict) else data_batch.latents
            latents.fill_(float('nan'))


def _nan(bench: Any) -> dict[str, Any]:
    """Train until a step is NaN."""
    base, poison, message = bench.base, Poison(), ''
    cfg = base.config('t2i', 1, BAD + 5)
    with base.runner(cfg, [poison]) as runner:
        try:
            runner.train()
        except UserError as error:
            message = str(error)
        after = runner.bare_model.state_dict()
        equal = bool(poison.before) and all(torch.equal(after[k], v) for k, v in poison.before.items())
    return {'stopped': bool(message), 'names_its_step': f'step {BAD + 1}:' in message,
            'weights_of_last_good_step': equal}


def _offload(bench: Any) -> dict[str, Any]:
    """Make an image with offloading and without."""
    try:
        return _compare_offload(bench.base)
    finally:
        bench.base.forget()  # its parts have hooks now


def _compare_offload(base: Any) -> dict[str, Any]:
    results, peaks = [], []
    for offload in (False, True):
        inferencer = _inferencer(base, (), 'off', **{'infer_cfg.offload': offload})
        base.free()
        results.append(copy.deepcopy(inferencer(PROMPT, height=base.resolution, width=base.resolution, seed=0,
                                                output_type='pt', num_inference_steps=STEPS).cpu()))
        peaks.append(peak(base.device))
        base.restore(inferencer.model)
    return {'equal': torch.equal(*results), 'peak_gib': peaks[1], 'peak_gib_without': peaks[0]}
