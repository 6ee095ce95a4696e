"""The sampling loop: a diffusers scheduler, our denoiser, guidances."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.registry import GUIDANCES, SAMPLERS, nearest
from diffengine_sdxl.samplers.guidance import BRANCHES, Guidance, Step, guide
from diffengine_sdxl.structures import Batch


@SAMPLERS.register_module()
class Sampler:
    """Makes latents from noise, from the prompts and conditions of a batch.

    An image depends on its seed and inputs, not on its place in the batch. In fp32 on a CPU the loop is bitwise
    that of diffusers' SDXL pipelines. Latents stay in fp32; the denoiser casts them.

    Args:
        scheduler: `type`, a scheduler class of diffusers, and settings that replace those of the base's own.
        num_inference_steps: solver steps.
        guidances: configs; at the least classifier-free guidance.
        eta: DDIM's noise, for schedulers that know it.

    Raises:
        ValueError: no such scheduler, or a setting it does not know.
    """

    def __init__(self, scheduler: Mapping[str, Any] | None = None, num_inference_steps: int = 50,
                 guidances: Sequence[Any] = ({'type': 'CFG', 'scale': 5.0},), eta: float = 0.0) -> None:
        settings = dict(scheduler or {'type': 'EulerDiscreteScheduler'})
        self.scheduler_class = _scheduler_class(settings.pop('type', 'EulerDiscreteScheduler'))
        known = list(inspect.signature(self.scheduler_class.__init__).parameters)
        self.knows_zero_snr = 'rescale_betas_zero_snr' in known
        for key in settings:
            if key not in known:
                raise ValueError(f"{self.scheduler_class.__name__} has no setting '{key}'.{nearest(key, known)}")
        if num_inference_steps < 1:
            raise ValueError(f'num_inference_steps={num_inference_steps} must be at least 1.')
        self.settings, self.num_inference_steps, self.eta = settings, num_inference_steps, eta
        self.guidances: list[Guidance] = [GUIDANCES.build(dict(g)) for g in guidances]

    @torch.no_grad()
    def __call__(self, model: Any, batch: Batch, on_step: Callable[[int, int], None] | None = None) -> Tensor:
        """Latents [B, 4, h, w], fp32 (fp64 for an fp64 model), of the pictures that `batch` asks for.

        Args:
            model: an SDXL. batch: its `size` (H, W), else the size of its images or conditions, is the pictures'.
            on_step: called with (steps done, steps in all).

        Raises:
            ValueError: a side cannot be divided; or latents are not finite, at which step.
        """
        scheduler = self.build_scheduler(model)
        device = batch.time_ids.device
        scheduler.set_timesteps(self.num_inference_steps, device=device)
        if hasattr(scheduler, 'set_begin_index'):
            # Else a scheduler looks its place up by the timestep, and skips a step where two round to the same.
            scheduler.set_begin_index(0)
        generators = [torch.Generator().manual_seed(int(seed)) for seed in batch.seed]
        x = self._noise(model, picture_size(batch, model), generators).to(device)
        x = x * scheduler.init_noise_sigma
        options = self._step_options(scheduler, generators)
        encoded: dict[tuple[str, ...], Any] = {}
        total = len(scheduler.timesteps)
        for i, t in enumerate(scheduler.timesteps):
            begin, end = i / total, (i + 1) / total
            active = [g for g in self.guidances if g.active(begin, end)]
            wanted = {b for g in active for b in g.branches()} | {'cond'}
            branches = tuple(b for b in BRANCHES if b in wanted)
            if branches not in encoded:
                encoded[branches] = model.encode(batch, branches, project=True)
            rows = scheduler.scale_model_input(torch.cat([x] * len(branches)), t)
            progress = torch.tensor([[begin, end]]).expand(len(rows), 2)
            prediction = model.predict(rows, t, encoded[branches], progress).to(x.dtype)
            step = Step(x, t, dict(zip(branches, prediction.chunk(len(branches)), strict=True)))
            x = scheduler.step(guide(active, step), t, x, **options, return_dict=False)[0]
            if on_step is not None:
                on_step(i + 1, total)
        if not torch.isfinite(x).all():
            raise ValueError(f'The sampled latents are not finite after {total} steps; a guidance scale that is too '
                             'large or fp16 weights that overflow do this.')
        return x

    def build_scheduler(self, model: Any) -> Any:
        """A fresh scheduler with the base's noise schedule, prediction type and spacing, and our settings.

        Raises:
            ValueError: the model has zero terminal SNR, of which the scheduler knows nothing.
        """
        if model.schedule.zero_terminal_snr and not self.knows_zero_snr:
            raise ValueError(f'{self.scheduler_class.__name__} cannot sample a model with zero terminal SNR; take '
                             'EulerDiscreteScheduler, DDIMScheduler or DPMSolverMultistepScheduler.')
        return self.scheduler_class.from_config(model.scheduler_settings, **self.settings)

    def _noise(self, model: Any, size: tuple[int, int], generators: Sequence[torch.Generator]) -> Tensor:
        shape = (1, model.unet.config.out_channels, size[0] // model.vae_factor, size[1] // model.vae_factor)
        dtype = torch.promote_types(model.unet.dtype, torch.float32)
        return torch.cat([torch.randn(shape, generator=g, dtype=dtype) for g in generators])

    def _step_options(self, scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
        known = inspect.signature(scheduler.step).parameters
        options = {'eta': self.eta, 'generator': generators}
        return {k: v for k, v in options.items() if k in known}


def picture_size(batch: Batch, model: Any) -> tuple[int, int]:
    """Height and width, in pixels, of the pictures that `batch` asks `model` (an SDXL) for.

    Raises:
        ValueError: nothing says so, or they cannot be divided.
    """
    size = batch.size
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


def _scheduler_class(name: str) -> Any:
    import diffusers
    known = [n for n in dir(diffusers) if n.endswith('Scheduler')]
    if name not in known:
        raise ValueError(f"scheduler type='{name}' is not a scheduler of diffusers.{nearest(name, known)}")
    return getattr(diffusers, name)
