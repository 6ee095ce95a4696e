"""The sampling loop: a diffusers scheduler, our denoiser, guidances."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.registry import GUIDANCES, SAMPLERS
from diffengine_sdxl.samplers import schedulers, solver
from diffengine_sdxl.samplers.begin import Repaint, begin, strength_of
from diffengine_sdxl.samplers.finite import Watch
from diffengine_sdxl.samplers.guidance import (
    BRANCHES,
    CFG,
    Guidance,
    Rescale,
    Step,
    anchor_of,
    guidance_embedding,
    guide,
)
from diffengine_sdxl.samplers.self_attention import SAG
from diffengine_sdxl.structures import Batch, Conditioning, Taps


@SAMPLERS.register_module()
class Sampler:
    """Makes latents from noise, or from a picture, and the prompts and conditions of a batch.

    An image depends on its seed and inputs, not on its place in the batch. In fp32 on a CPU the loop is bitwise
    that of diffusers' SDXL pipelines for text-to-image, image-to-image and inpainting. Latents stay in fp32; the
    denoiser casts them.

    Args:
        scheduler: `type`, a scheduler class of diffusers, and settings that replace those of the base's own.
        num_inference_steps: solver steps.
        guidances: configs; at the least classifier-free guidance.
        eta: DDIM's noise, for schedulers that know it.
        timesteps, sigmas: the solver's own, in place of num_inference_steps.
        strength: how far back towards noise a given picture is taken; None: 0.3, for inpainting 0.9999.
        denoising_start, denoising_end: parts of the way at which to begin, with a picture that has its noise already,
            and to stop: the two halves of an ensemble of expert denoisers. `strength` is ignored beside the first.

    Raises:
        ValueError: no such scheduler, or a setting it does not know.
    """

    def __init__(self, scheduler: Mapping[str, Any] | None = None, num_inference_steps: int = 50,
                 guidances: Sequence[Any] = ({'type': 'CFG', 'scale': 5.0},), eta: float = 0.0,
                 timesteps: Sequence[int] | None = None, sigmas: Sequence[float] | None = None,
                 strength: float | None = None, denoising_start: float | None = None,
                 denoising_end: float | None = None) -> None:
        if not isinstance(scheduler, Mapping | None):
            raise ValueError(f"scheduler={scheduler!r} must be a dict with a type: dict(type='DDIMScheduler'), or "
                             'scheduler.type=DDIMScheduler on the command line.')
        settings = dict(scheduler or {'type': 'EulerDiscreteScheduler'})
        self.scheduler_class = schedulers.scheduler_class(settings.pop('type', 'EulerDiscreteScheduler'))
        self.guidances: list[Guidance] = [GUIDANCES.build(dict(g)) for g in guidances]
        self.settings, self.num_inference_steps, self.eta = settings, num_inference_steps, eta
        self.timesteps, self.sigmas, self.strength = timesteps, sigmas, strength
        self.denoising_start, self.denoising_end = denoising_start, denoising_end
        schedulers.check_settings(self.scheduler_class, settings)
        self._check()

    def _check(self) -> None:
        schedulers.check_steps(self.scheduler_class, self.timesteps, self.sigmas, self.eta)
        for name in ('timesteps', 'sigmas'):
            if getattr(self, name) is not None:
                solver.check_own(name, getattr(self, name))
        if not isinstance(self.num_inference_steps, Integral) or self.num_inference_steps < 1:
            raise ValueError(f'num_inference_steps={self.num_inference_steps} must be at least 1, and whole.')
        for name in ('strength', 'denoising_start', 'denoising_end'):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and 0 < value <= 1):
                raise ValueError(f'{name}={value!r} must be above 0 and at most 1.')
        if (self.denoising_start or 0) >= (self.denoising_end or 2):
            raise ValueError(f'denoising_start={self.denoising_start} must be below denoising_end='
                             f'{self.denoising_end}.')

    def changed(self, guidance_scale: float | None = None, guidance_rescale: float | None = None,
                **settings: Any) -> Sampler:
        """A copy with other settings, under the names of __init__; None leaves one as it is.

        Args:
            guidance_scale: of classifier-free guidance, which is added where there is none.
            guidance_rescale: of Rescale, likewise.

        Raises:
            ValueError: a value that it cannot take.
        """
        new = copy.copy(self)
        known = inspect.signature(type(self).__init__).parameters
        for name, value in settings.items():
            assert name in known and name not in ('scheduler', 'guidances'), name
            if value is not None:
                setattr(new, name, value)
        if settings.get('num_inference_steps') is not None:
            new.timesteps = new.sigmas = None
        for name in ('timesteps', 'sigmas'):
            if settings.get(name) is not None:
                new.timesteps, new.sigmas = settings.get('timesteps'), settings.get('sigmas')
        new.guidances = list(self.guidances)
        for kind, scale in ((CFG, guidance_scale), (Rescale, guidance_rescale)):
            if scale is not None:
                old = [g for g in new.guidances if isinstance(g, kind)] or [kind(scale)]
                new.guidances = [g for g in new.guidances if not isinstance(g, kind)]
                new.guidances += [kind(scale, window=g.window) for g in old]
        new._check()
        return new

    @torch.no_grad()
    def __call__(self, model: Any, batch: Batch, on_step: Callable[[int, int], None] | None = None,
                 generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Latents [B, 4, h, w], fp32 (fp64 for an fp64 model), of the pictures that `batch` asks for.

        The model's weights are frozen for the length of the call, so that a model that trains samples what its export
        does.

        Args:
            model: an SDXL. batch: its `size` (H, W), else the size of its images or conditions, is the pictures';
                its `start` what to begin with.
            on_step: called with (steps done, steps in all).
            generators: one a row, CPU's; None makes them of `batch.seed`. A second stage goes on with the first one's.

        Raises:
            ValueError: a side cannot be divided, no step is left, other counts of generators and pictures; or latents
                are not finite, from which step on.
        """
        generators = list(generators or [torch.Generator().manual_seed(int(seed)) for seed in batch.seed])
        if len(generators) != len(batch):
            raise ValueError(f'There are {len(generators)} generator(s) for {len(batch)} pictures; give each its own.')
        with model.frozen():
            return self._sampled(model, batch, on_step, generators)

    def _sampled(self, model: Any, batch: Batch, on_step: Callable[[int, int], None] | None,
                 generators: list[torch.Generator]) -> Tensor:
        """The loop over the scheduler's timesteps."""
        scheduler, way, x, repaint = self._prepared(model, batch, generators)
        options = schedulers.step_options(scheduler, self.eta, generators)
        parts = [((way.first + i) / way.total, (way.first + i + 1) / way.total) for i in range(len(way.timesteps))]
        acting = [self._active(model, *part) for part in parts]
        # Encoded once, for the whole way; steps outside a guidance's window leave out rows.
        needed = _branches([guidance for active in acting for guidance in active])
        encoded = self._encoded(model, batch, needed, repaint)
        watch = Watch()
        for i, (t, part, active) in enumerate(zip(way.timesteps, parts, acting, strict=True)):
            branches = _branches(active)
            told = encoded if branches == needed else _rows(encoded, needed, branches)
            rows = scheduler.scale_model_input(torch.cat([x] * len(branches)), t)
            step = self._evaluated(model, rows, t, told, torch.tensor([part]), branches, active, x.dtype)
            watch.begin(i, t)
            for branch, prediction in step.predictions.items():
                watch(f"the UNet ('{branch}')", prediction)
            x = scheduler.step(guide(active, step, watch), t, x, **options, return_dict=False)[0]
            watch(self.scheduler_class.__name__, x)
            if repaint is not None:
                x = repaint.blend(scheduler, x, way.timesteps[i + 1] if i + 1 < len(way.timesteps) else None)
            if on_step is not None:
                on_step(i + 1, len(way.timesteps))
        watch.check(len(way.timesteps))
        return x

    def _prepared(self, model: Any, batch: Batch, generators: list[torch.Generator]) -> Any:
        """Scheduler, span, latents to begin with, and what inpainting keeps."""
        size = picture_size(batch, model)
        scheduler = self.build_scheduler(model)
        num = solver.set_steps(scheduler, self.num_inference_steps, self.timesteps, self.sigmas, model.device)
        if self.denoising_start is not None and (batch.start is None or not batch.start.given):
            raise ValueError(f'denoising_start={self.denoising_start} goes on from a picture that has its noise; there '
                             'is none.')
        strength = strength_of(self.strength, batch.start)
        way = solver.span(scheduler, num, strength, self.denoising_start, self.denoising_end)
        x, repaint = begin(model, batch.start, size, scheduler, way.timesteps, generators, strength,
                           noised=self.denoising_start is None)
        return scheduler, way, x, repaint

    def _active(self, model: Any, begin_: float, end: float) -> list[Guidance]:
        found = [g for g in self.guidances if g.active(begin_, end)]
        if model.unet.config.time_cond_proj_dim is not None:  # a distilled LCM reads the scale itself
            found = [g for g in found if not isinstance(g, CFG)]
        return sorted(found, key=lambda g: g.order)

    def _encoded(self, model: Any, batch: Batch, branches: tuple[str, ...], repaint: Repaint | None) -> Conditioning:
        """What the denoiser is told, with what a UNet for inpainting or a distilled one reads besides."""
        encoded: Conditioning = model.encode(batch, branches, project=True)
        if repaint is not None and repaint.channels is not None:
            encoded.channels = torch.cat([repaint.channels] * len(branches))
        if (dim := model.unet.config.time_cond_proj_dim) is not None:
            scale = next((g.scale for g in self.guidances if isinstance(g, CFG)), 1.0)
            encoded.timestep_cond = guidance_embedding(scale, dim).expand(len(encoded.text), dim).to(model.device)
        return encoded

    def _evaluated(self, model: Any, rows: Tensor, t: Tensor, conditioning: Conditioning, progress: Tensor,
                   branches: tuple[str, ...], active: Sequence[Guidance], dtype: torch.dtype) -> Step:
        """The UNet's outputs by branch, and what guidances need beside them."""
        size = len(rows) // len(branches)
        at = {branch: slice(i * size, (i + 1) * size) for i, branch in enumerate(branches)}
        anchor = at[anchor_of(branches)]
        taps = Taps(perturbed=at.get('perturbed'), anchor=anchor)
        for guidance in active:
            guidance.tap(taps)
        tapped = taps if taps.identity or taps.recorded else None
        prediction = model.predict(rows, t, conditioning, progress.expand(len(rows), 2), tapped).to(dtype)

        def again(x: Tensor) -> Tensor:
            return model.predict(x, t, conditioning.rows(anchor), progress.expand(size, 2))
        predictions = dict(zip(branches, prediction.chunk(len(branches)), strict=True))
        return Step(rows[anchor], t, predictions, taps.maps, model.schedule, again)

    def build_scheduler(self, model: Any) -> Any:
        """A fresh scheduler with the base's noise schedule, prediction type and spacing, and our settings.

        Raises:
            ValueError: the model has zero terminal SNR, of which the scheduler knows nothing; it was trained on
                another prediction_type; or the base's settings and ours don't go together.
        """
        asked = self.settings.get('prediction_type', model.schedule.prediction_type)
        if asked not in (model.schedule.prediction_type, 'sample') or asked == 'sample' and any(
                isinstance(g, SAG) for g in self.guidances):
            raise ValueError(f"The scheduler's prediction_type='{asked}' contradicts the model's, "
                             f"'{model.schedule.prediction_type}'; training, guidances and sampling follow "
                             'model.prediction_type.')
        if model.schedule.zero_terminal_snr and 'rescale_betas_zero_snr' not in inspect.signature(
                self.scheduler_class.__init__).parameters:
            raise ValueError(f'{self.scheduler_class.__name__} cannot sample a model with zero terminal SNR; take '
                             'EulerDiscreteScheduler, DDIMScheduler or DPMSolverMultistepScheduler.')
        return schedulers.made(self.scheduler_class, model.scheduler_settings, self.settings)


def _branches(active: Sequence[Guidance]) -> tuple[str, ...]:
    wanted = {b for g in active for b in g.branches()} | {'cond'}
    return tuple(b for b in BRANCHES if b in wanted)


def _rows(encoded: Conditioning, needed: tuple[str, ...], branches: tuple[str, ...]) -> Conditioning:
    """Of what `needed` are told, what `branches` are; these lie side by side, as 'cond' is one and in the middle."""
    size, first = len(encoded.text) // len(needed), needed.index(branches[0])
    assert needed[first:first + len(branches)] == branches, (needed, branches)
    return encoded.rows(slice(first * size, (first + len(branches)) * size))


def picture_size(batch: Batch, model: Any) -> tuple[int, int]:
    """Height and width, in pixels, of the pictures that `batch` asks `model` (an SDXL) for.

    Raises:
        ValueError: nothing says so, or they cannot be divided.
    """
    size = batch.size
    if size is None and batch.start is not None and batch.start.given:
        if batch.start.image is not None:
            size = (batch.start.image.shape[-2], batch.start.image.shape[-1])
        else:
            assert batch.start.latents is not None
            size = (batch.start.latents.shape[-2] * model.vae_factor, batch.start.latents.shape[-1] * model.vae_factor)
    if size is None:
        # What no adapter reads lies over the picture too (a data set's own); an image prompt does not.
        prompts = {n for a in model.adapters.values() if not a.of_picture_size for n in (a.reads, f'{a.reads}_embeds')}
        over = [t for name, t in batch.conditions.items() if name not in prompts and t.dim() == 4]
        images = [t for t in (batch.img, *over) if t is not None]
        if not images:
            raise ValueError("Nothing says how large the pictures shall be: give the samples 'size', or an image.")
        size = (images[0].shape[-2], images[0].shape[-1])
    check_size(size, model.size_divisor)
    return size


def check_size(size: tuple[int, int], divisor: int) -> None:
    """Refuse a height and width (pixels) that `divisor` does not divide.

    Raises:
        ValueError: it does not.
    """
    if size[0] < divisor or size[1] < divisor or size[0] % divisor or size[1] % divisor:
        raise ValueError(f'Pictures of {size[0]} x {size[1]} cannot be made: {divisor} must divide both sides.')
