"""The sampling loop: a diffusers scheduler, a denoiser, guidances."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl import limits
from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.protocols import Denoiser
from diffengine_sdxl.registry import GUIDANCES, SAMPLERS
from diffengine_sdxl.samplers import schedulers
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
from diffengine_sdxl.samplers.initial_latents import Inpainting, effective_strength, initial_latents
from diffengine_sdxl.samplers.non_finite import NonFiniteDetector
from diffengine_sdxl.samplers.self_attention import PAG, SAG
from diffengine_sdxl.samplers.timesteps import SelectedTimesteps, select_timesteps, set_timesteps
from diffengine_sdxl.settings import check_custom_steps
from diffengine_sdxl.structures import AttentionProbes, Batch, Conditioning, send

#: Settings of one request that are a guidance's scale.
SCALES: dict[str, type[Guidance]] = {'guidance_scale': CFG, 'guidance_rescale': Rescale, 'pag_scale': PAG,
                                     'sag_scale': SAG}


@SAMPLERS.register_module()
class Sampler:
    """Sample latents from noise or an image, and the prompts and conditions of a batch.

    An image depends on its seed and inputs, not on its place in the batch. In fp32 on a CPU the loop is bitwise
    that of diffusers' SDXL pipelines for text-to-image, image-to-image and inpainting. Latents stay in fp32; the
    denoiser casts them.

    Args:
        scheduler: `type`, one of `schedulers.SCHEDULERS`, and settings that replace the base's.
        num_inference_steps: solver steps.
        guidances: configs; usually classifier-free guidance at least.
        eta: DDIM's noise, for schedulers that read it.
        timesteps, sigmas: custom ones, in place of num_inference_steps.
        strength: how far towards noise an image is taken; None: 0.3, for inpainting 0.9999.
        denoising_start, denoising_end: fractions of denoising at which to start, from an image that is noisy already,
            and to stop: the two halves of an ensemble of expert denoisers. The first overrides `strength`.

    Raises:
        UserError: the scheduler is unknown, or a setting is invalid.
    """

    def __init__(self, scheduler: Mapping[str, Any] | None = None, num_inference_steps: int = 50,
                 guidances: Sequence[Mapping[str, Any]] = ({'type': 'CFG', 'scale': 5.0},), eta: float = 0.0,
                 timesteps: Sequence[int] | None = None, sigmas: Sequence[float] | None = None,
                 strength: float | None = None, denoising_start: float | None = None,
                 denoising_end: float | None = None) -> None:
        if not isinstance(scheduler, Mapping | None):
            raise UserError(f"scheduler={scheduler!r} must be a dict with a type: dict(type='DDIMScheduler'), or "
                            'scheduler.type=DDIMScheduler on the command line.')
        settings = dict(scheduler or {})
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
                check_custom_steps(name, getattr(self, name))
        self.num_inference_steps = whole_number('num_inference_steps', self.num_inference_steps, 1)
        if self.num_inference_steps > (most := limits.CURRENT.solver_steps):
            raise UserError(f'num_inference_steps={self.num_inference_steps} must be at most {most} '
                            '(limits.solver_steps).')
        for name in ('strength', 'denoising_start', 'denoising_end'):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and 0 < value <= 1):  # type: ignore[operator]
                raise UserError(f'{name}={value!r} must be above 0 and at most 1.')
        if (self.denoising_start or 0) >= (self.denoising_end or 2):
            raise UserError(f'denoising_start={self.denoising_start} must be below denoising_end='
                            f'{self.denoising_end}.')

    def changed(self, **settings: Any) -> Sampler:
        """Return a copy with other settings, named as in __init__; None keeps one.

        Args:
            settings: also those of SCALES; a guidance that the sampler does not have is added.

        Raises:
            UserError: a value is invalid.
        """
        new = copy.copy(self)
        known = inspect.signature(type(self).__init__).parameters
        scales = {name: settings.pop(name) for name in SCALES if settings.get(name) is not None}
        settings = {name: value for name, value in settings.items() if name not in SCALES}
        for name, value in settings.items():
            assert name in known and name not in ('scheduler', 'guidances'), name
            if value is not None:
                setattr(new, name, value)
        if settings.get('num_inference_steps') is not None:
            new.timesteps = new.sigmas = None
        if settings.get('timesteps') is not None or settings.get('sigmas') is not None:
            new.timesteps, new.sigmas = settings.get('timesteps'), settings.get('sigmas')
        new.guidances = list(self.guidances)
        for name, scale in scales.items():
            old = [g for g in new.guidances if isinstance(g, SCALES[name])] or [SCALES[name](scale)]
            new.guidances = [g for g in new.guidances if not isinstance(g, SCALES[name])]
            new.guidances += [g.with_scale(scale) for g in old]
        new._check()
        return new

    @torch.no_grad()
    def __call__(self, model: Denoiser, batch: Batch, on_step: Callable[[int, int], None] | None = None,
                 generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Return latents [B, 4, h, w], fp32 (fp64 for an fp64 model).

        The model's weights are frozen during the call, so that a model in training samples what its export does.

        Args:
            batch: the images' size is its `size` (H, W), else that of its images or conditions; `start` is what to
                start from.
            on_step: called with (steps done, total steps).
            generators: one per row, on the CPU; None makes them from `batch.seed`. A second stage continues with the
                first one's.

        Raises:
            UserError: the size is not divisible, no step is left, the number of generators is wrong, or the latents
                are not finite.
        """
        generators = list(generators or [torch.Generator().manual_seed(int(seed)) for seed in batch.seed])
        if len(generators) != len(batch):
            raise UserError(f'There are {len(generators)} generator(s) for {len(batch)} images; give one per image.')
        with model.frozen():
            return self._sample(model, batch, on_step, generators)

    def _sample(self, model: Denoiser, batch: Batch, on_step: Callable[[int, int], None] | None,
                generators: list[torch.Generator]) -> Tensor:
        """Loop over the scheduler's timesteps."""
        scheduler, selected, x, inpainting = self._prepare(model, batch, generators)
        timesteps, num_steps = selected.timesteps, len(selected.timesteps)
        # The scheduler reads its timesteps on the CPU, where that does not wait for the device; the UNet on the device.
        on_device = send(timesteps, model.device)
        options = schedulers.step_options(scheduler, self.eta, generators)
        progress = [((selected.first + i) / selected.total, (selected.first + i + 1) / selected.total)
                    for i in range(num_steps)]
        active = [self._active(model, *ends) for ends in progress]
        # Encoded once for all steps; steps outside a guidance's active range leave out rows.
        all_branches = _branches([guidance for guidances in active for guidance in guidances])
        encoded = self._encode(model, batch, all_branches, inpainting)
        detector = NonFiniteDetector()
        for i, t in enumerate(timesteps):
            branches = _branches(active[i])
            conditioning = encoded if branches == all_branches else _rows(encoded, all_branches, branches)
            rows = scheduler.scale_model_input(torch.cat([x] * len(branches)), t)
            step = evaluate(model, rows, on_device[i], conditioning, torch.tensor([progress[i]]), branches, active[i],
                            x.dtype)
            record = partial(detector.record, i, t)
            for branch, prediction in step.predictions.items():
                record(f"the UNet ('{branch}')", prediction)
            x = scheduler.step(guide(active[i], step, record), t, x, **options, return_dict=False)[0]
            record(self.scheduler_class.__name__, x)
            if inpainting is not None:
                x = inpainting.blend(scheduler, x, on_device[i + 1] if i + 1 < num_steps else None)
            if on_step is not None:
                on_step(i + 1, num_steps)
        detector.check(num_steps)
        return x

    def _prepare(self, model: Denoiser, batch: Batch, generators: list[torch.Generator]
                 ) -> tuple[Any, SelectedTimesteps, Tensor, Inpainting | None]:
        """Return the scheduler, the timesteps to run, the initial latents, and what inpainting needs."""
        size = output_size(batch, model)
        scheduler = self.build_scheduler(model)
        num = set_timesteps(scheduler, self.num_inference_steps, self.timesteps, self.sigmas)
        if self.denoising_start is not None and (batch.start is None or not batch.start.given):
            raise UserError(f'denoising_start={self.denoising_start} needs a noisy image to start from, and there is '
                            'none.')
        strength = effective_strength(self.strength, batch.start)
        selected = select_timesteps(scheduler, num, strength, self.denoising_start, self.denoising_end)
        x, inpainting = initial_latents(model, batch.start, size, scheduler, selected.timesteps, generators, strength,
                                        add_noise=self.denoising_start is None)
        return scheduler, selected, x, inpainting

    def _active(self, model: Denoiser, start: float, end: float) -> list[Guidance]:
        guidances = [g for g in self.guidances if g.active(start, end)]
        if model.unet.config.time_cond_proj_dim is not None:  # a distilled LCM takes the scale as an input
            guidances = [g for g in guidances if not isinstance(g, CFG)]
        return sorted(guidances, key=lambda g: g.order)

    def _encode(self, model: Denoiser, batch: Batch, branches: tuple[str, ...], inpainting: Inpainting | None
                ) -> Conditioning:
        """Return the conditioning, with the inputs that a UNet for inpainting or a distilled one takes besides."""
        encoded = model.encode(batch, branches, project=True)
        if inpainting is not None and inpainting.channels is not None:
            encoded.channels = torch.cat([inpainting.channels] * len(branches))
        if (dim := model.unet.config.time_cond_proj_dim) is not None:
            scale = next((g.scale for g in self.guidances if isinstance(g, CFG)), 1.0)
            encoded.timestep_cond = send(guidance_embedding(scale, dim), model.device).expand(len(encoded.text), dim)
        return encoded

    def build_scheduler(self, model: Denoiser) -> Any:
        """Return a fresh scheduler with the base's noise schedule, prediction type and spacing, and our settings.

        Raises:
            UserError: the scheduler does not support the model's zero terminal SNR, its prediction_type is not the
                model's, or diffusers refuses the settings.
        """
        trained = model.schedule.prediction_type
        prediction_type = self.settings.get('prediction_type', trained)
        if prediction_type not in (trained, 'sample') or prediction_type == 'sample' and any(
                isinstance(g, SAG) for g in self.guidances):
            raise UserError(f"The scheduler's prediction_type='{prediction_type}' contradicts the model's, "
                            f"'{trained}'; set model.prediction_type instead.")
        if model.schedule.zero_terminal_snr and 'rescale_betas_zero_snr' not in inspect.signature(
                self.scheduler_class.__init__).parameters:
            raise UserError(f'{self.scheduler_class.__name__} cannot sample a model with zero terminal SNR; use '
                            'EulerDiscreteScheduler, DDIMScheduler or DPMSolverMultistepScheduler.')
        return schedulers.make_scheduler(self.scheduler_class, model.scheduler_settings, self.settings)


def evaluate(model: Denoiser, rows: Tensor, t: Tensor, conditioning: Conditioning, progress: Tensor,
             branches: tuple[str, ...], guidances: Sequence[Guidance], dtype: torch.dtype) -> Step:
    """Call the UNet once; return its outputs by branch and what guidances need besides.

    Args:
        rows: its input, [len(branches) * B, 4, h, w]. progress: [1, 2], see UNetCall. dtype: of the predictions.
    """
    size = len(rows) // len(branches)
    slices = {branch: slice(i * size, (i + 1) * size) for i, branch in enumerate(branches)}
    anchor = slices[anchor_of(branches)]
    probes = AttentionProbes(perturbed=slices.get('perturbed'), anchor=anchor)
    for guidance in guidances:
        guidance.add_probes(probes)
    needs_probes = bool(probes.identity or probes.recorded)
    prediction = model.predict(rows, t, conditioning, progress.expand(len(rows), 2), probes if needs_probes else None)

    def denoise_again(x: Tensor) -> Tensor:
        return model.predict(x, t, conditioning.rows(anchor), progress.expand(size, 2))
    predictions = dict(zip(branches, prediction.to(dtype).chunk(len(branches)), strict=True))
    return Step(rows[anchor], t, predictions, probes.maps, model.schedule, denoise_again)


def _branches(guidances: Sequence[Guidance]) -> tuple[str, ...]:
    needed = {b for g in guidances for b in g.branches()} | {'cond'}
    return tuple(b for b in BRANCHES if b in needed)


def _rows(encoded: Conditioning, all_branches: tuple[str, ...], branches: tuple[str, ...]) -> Conditioning:
    """Return the rows of `branches`; they are adjacent, as 'cond' is one of them and in the middle."""
    size, first = len(encoded.text) // len(all_branches), all_branches.index(branches[0])
    assert all_branches[first:first + len(branches)] == branches, (all_branches, branches)
    return encoded.rows(slice(first * size, (first + len(branches)) * size))


def output_size(batch: Batch, model: Denoiser) -> tuple[int, int]:
    """Return height and width, in pixels, of the images to make.

    Raises:
        UserError: neither the batch's size nor an image sets it, or the model cannot make images of this size.
    """
    size, start = batch.size, batch.start
    if size is None and start is not None and start.image is not None:
        size = start.image.shape[-2], start.image.shape[-1]
    elif size is None and start is not None and start.latents is not None:
        size = start.latents.shape[-2] * model.vae_factor, start.latents.shape[-1] * model.vae_factor
    if size is None:
        # A condition that no adapter reads (a data set's own) has the image's size, too; an image prompt does not.
        prompts = {name for a in model.adapters.values() if not a.condition_has_image_size
                   for name in (a.condition_key, f'{a.condition_key}_embeds')}
        conditions = [t for name, t in batch.conditions.items() if name not in prompts and t.dim() == 4]
        images = [t for t in (batch.img, *conditions) if t is not None]
        if not images:
            raise UserError("Cannot infer the output size: give the samples 'size', or an image.")
        size = images[0].shape[-2], images[0].shape[-1]
    check_size(size, model.size_divisor)
    return size


def check_size(size: tuple[int, int], divisor: int) -> None:
    """Check that `divisor` divides a height and width (pixels).

    Raises:
        UserError: it does not.
    """
    if size[0] < divisor or size[1] < divisor or size[0] % divisor or size[1] % divisor:
        raise UserError(f'Images of {size[0]} x {size[1]} cannot be made: {divisor} must divide both sides.')
