"""What a training needs of a device, from the counts of its step, and settings that suit the device better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffengine_sdxl.commands.plan.devices import LIBRARIES, Device
from diffengine_sdxl.commands.plan.step_counts import Pass, StepCounts, bytes_of
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.prompt_branches import ENCODERS
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import OPTIMIZERS
from diffengine_sdxl.speed import CHOICES

#: Bytes of optimizer states for each of a trained weight: of optimizers that may not be installed, or need a GPU.
STATES = {'AdamW8bit': 0.5, 'Prodigy': 4.0}
#: Bytes that a fused optimizer's step reads and writes for each of trained weights, gradients and states.
STEPPED = 2.0
#: Values of speed.checkpointing that are compared.
MODES = tuple(mode for mode in CHOICES['checkpointing'] if mode != 'auto')


@dataclass(frozen=True)
class Training:
    """What a config says of its training.

    Attributes:
        batch_size, accumulation: samples of a micro-batch, and micro-batches of a step; of one process.
        checkpointing: 'off', 'blocks' or 'full'.
        steps: optimizer steps; None: it trains for passes over its data.
        cached: frozen encoders' outputs come from a cache.
        optimizer: config.
        has_ema: an EMA of the trained weights is kept.
        keeps_grads: gradients are not freed between steps.
    """

    batch_size: int
    accumulation: int
    checkpointing: str
    steps: int | None
    cached: bool
    optimizer: Mapping[str, Any]
    has_ema: bool = False
    keeps_grads: bool = False


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights, and what training adds to them.

    Attributes:
        base: of what is in memory in any case: the UNet, and encoders that train or are adapted.
        encoders: of frozen encoders that a cache makes needless.
        adapters: of all adapters.
        trained: of what trains.
        states, ema: of the optimizer and the EMA.
        num_trained, num_frozen: parameters.
    """

    base: int
    encoders: int
    adapters: int
    trained: int
    states: int
    ema: int
    num_trained: int
    num_frozen: int

    @classmethod
    def of(cls, model: SDXL, training: Training, counts: StepCounts) -> Weights:
        """Count those of a model on the meta device."""
        of_adapters = {id(p): p for adapter in model.adapters.values() for p in adapter.all_parameters()}
        needless: list[nn.Module] = [*model.shared_encoders.values()]
        needless += [getattr(model, part) for name, part in (('VAE', 'vae'), *((part, part) for part in ENCODERS))
                     if name in counts.encoders]
        trained = [p for parameters in model.trainables().values() for _, p in parameters]
        own = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in of_adapters]
        encoders, num_trained = sum(map(bytes_of, needless)), sum(p.numel() for p in trained)
        return cls(base=bytes_of(own) - encoders, encoders=encoders, adapters=bytes_of(of_adapters.values()),
                   trained=bytes_of(trained), states=int(bytes_of(trained) * states_of(training.optimizer)),
                   ema=bytes_of(trained) * training.has_ema, num_trained=num_trained,
                   num_frozen=sum(p.numel() for p in model.parameters()) - num_trained)


def states_of(optimizer: Mapping[str, Any]) -> float:
    """Return the bytes of an optimizer's states for each byte of its weights, by a step on small ones.

    Raises:
        UserError: its arguments are wrong.
    """
    settings = {key: value for key, value in optimizer.items() if key != 'type' and value is not None}
    kind = str(optimizer.get('type')).rpartition('.')[2]
    if kind in STATES:
        return STATES[kind]
    weight = nn.Parameter(torch.zeros(256, 256))
    weight.grad = torch.ones_like(weight)
    try:
        built = OPTIMIZERS.get(str(optimizer.get('type')))([weight], **settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim_wrapper.optimizer (type='{kind}'): {error}.") from error
    built.step()
    return bytes_of([t for state in built.state.values() for t in state.values()
                     if isinstance(t, torch.Tensor)]) / bytes_of([weight])


@dataclass(frozen=True)
class Setting:
    """A batch size, accumulation and checkpointing with what they need.

    Attributes:
        memory: name of a part -> bytes; its sum is the peak.
        seconds: of an optimizer step.
        tflop: of an optimizer step.
        bound_by_host: the device waits for kernels to be launched.
    """

    batch_size: int
    accumulation: int
    checkpointing: str
    cached: bool
    memory: Mapping[str, float]
    seconds: float
    tflop: float
    bound_by_host: bool

    @property
    def peak(self) -> float:
        """Bytes at the peak."""
        return sum(self.memory.values())

    def fits(self, device: Device) -> bool:
        """Return whether the device's memory suffices."""
        return self.peak <= device.memory

    @property
    def images_per_second(self) -> float:
        """Samples that a process trains on in a second."""
        return self.batch_size * self.accumulation / self.seconds


def setting(counts: StepCounts, weights: Weights, device: Device, training: Training, *, batch_size: int,
            checkpointing: str, cached: bool) -> Setting:
    """Estimate a step of `training`'s samples with another batch size, checkpointing or cache."""
    accumulation = training.batch_size * training.accumulation // batch_size
    one = counts.at(batch_size, checkpointing)
    calls = [] if cached else list(counts.encoders.values())
    seconds, by_host = _seconds(one, calls, batch_size, device)
    moved = STEPPED * (2 * weights.trained + weights.states) + 3 * weights.ema
    flop = one.flop + batch_size * sum(call.flop for call in calls)
    return Setting(batch_size, accumulation, checkpointing, cached,
                   _memory(one, calls, counts, weights, device, training, accumulation, cached),
                   accumulation * seconds + moved / device.rates.copy, accumulation * flop / 1e12, by_host)


def _seconds(one: Pass, calls: list[Pass], batch_size: int, device: Device) -> tuple[float, bool]:
    """Return the seconds of a micro-batch, and whether the host is slower than the GPU, which works meanwhile."""
    work = one.seconds + batch_size * sum(call.seconds for call in calls)
    host = device.rates.host * (one.kernels + batch_size * sum(call.kernels for call in calls))
    return (work + host, False) if device.type == 'cpu' else (max(work, host), host > work)


def _memory(one: Pass, calls: list[Pass], counts: StepCounts, weights: Weights, device: Device, training: Training,
            accumulation: int, cached: bool) -> dict[str, float]:
    kept = weights.trained if accumulation > 1 or training.keeps_grads else 0
    # Encoders run before anything is saved; theirs is the peak where the step itself needs little.
    peak = max(one.peak_of_others if kept else one.peak, *(call.peak for call in calls), 0)
    copies = min(counts.copies, one.saved)
    return {'frozen base': weights.base, 'adapters': weights.adapters,
            **({} if cached else {'frozen encoders': weights.encoders}),
            'optimizer states': weights.states, **({'EMA': weights.ema} if weights.ema else {}),
            'compute copies of what trains': copies, 'saved activations': one.saved - copies,
            'gradients and workspace': kept + max(peak - one.saved, 0)
            + (LIBRARIES if device.type == 'cuda' else 0)}


def propose(counts: StepCounts, weights: Weights, device: Device, training: Training) -> Setting | None:
    """Return the fastest setting with the config's samples a step that fits; None: none does.

    With a cache if there are encoders that it makes needless. Of those as fast to three digits the one with the least
    checkpointing, then the smallest batch.
    """
    samples = training.batch_size * training.accumulation
    cached = training.cached or bool(counts.encoders)
    settings = [setting(counts, weights, device, training, batch_size=size, checkpointing=mode, cached=cached)
                for mode in counts.at_one for size in range(1, samples + 1) if samples % size == 0]
    fitting = [s for s in settings if s.fits(device)]
    return min(fitting, default=None, key=lambda s: (float(f'{s.seconds:.3g}'), MODES.index(s.checkpointing),
                                                     s.batch_size))
