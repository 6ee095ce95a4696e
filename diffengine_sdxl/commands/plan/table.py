"""A plan, and the page that `plan` prints of it."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from diffengine_sdxl.commands.plan.devices import Device
from diffengine_sdxl.commands.plan.estimate import Setting, Training, Weights, setting
from diffengine_sdxl.commands.plan.step_counts import StepCounts

GIB, WIDTH = 2**30, 100


@dataclass(frozen=True)
class Plan:
    """What a training needs, and what is proposed.

    Attributes:
        device: what it is planned for.
        training, weights: of the config.
        size: height and width of the images, in pixels.
        own: the config's setting.
        proposed: the fastest one that fits; None: none does.
        notes: sentences on what was counted in place of what is not here.
    """

    device: Device
    training: Training
    weights: Weights
    size: tuple[int, int]
    own: Setting
    proposed: Setting | None
    counts: StepCounts
    notes: list[str]

    def uncached(self, cached: Setting) -> Setting:
        """Return a setting without a cache."""
        return setting(self.counts, self.weights, self.device, self.training, batch_size=cached.batch_size,
                       checkpointing=cached.checkpointing, cached=False)

    def figures(self) -> dict[str, Any]:
        """Return the plan as plain values, of bytes, seconds and TFLOP."""
        settings = {name: s and {**asdict(s), 'peak': s.peak, 'images_per_second': s.images_per_second}
                    for name, s in (('own', self.own), ('proposed', self.proposed))}
        return {'device': asdict(self.device), 'size': self.size, 'steps': self.training.steps,
                'weights': asdict(self.weights), **settings, 'notes': self.notes}


def report(plan: Plan) -> str:
    """Return what a person wants to read: the device, the memory by part, the time, and what is proposed."""
    device, own, proposed = plan.device, plan.own, plan.proposed
    memory = f'{device.memory / GIB:.1f} GiB ' + ('of memory' if device.type == 'cpu' else 'for PyTorch')
    rates = 'rates measured here' if device.measured else "rates by its sheet, at a usual share of each"
    height, width = plan.size
    weights = plan.weights
    lines = [f'Counted without weights; the times are estimates, of a step without torch.compile.\n'
             f'  device      {device.name}: {memory}; {rates}\n'
             f'  images      {height} x {width} pixels\n'
             f'  parameters  {_millions(weights.num_frozen)} frozen, {_millions(weights.num_trained)} trained']
    columns = {'this config': own, **({'proposed': proposed} if proposed and proposed != own else {})}
    lines.append(_table(plan, columns))
    lines += [text if '\n' in text else textwrap.fill(text, WIDTH) for text in [*_advice(plan), *plan.notes]]
    return '\n\n'.join(lines)


def _table(plan: Plan, columns: dict[str, Setting]) -> str:
    settings = list(columns.values())
    encoders = bool(plan.counts.encoders)
    rows = [['', *columns], ['batch x accumulation', *(f'{s.batch_size} x {s.accumulation}' for s in settings)],
            ['checkpointing', *(s.checkpointing for s in settings)],
            *([['cache', *('yes' if s.cached else 'no' for s in settings)]] if encoders else [])]
    unit, scale = ('GiB', GIB) if plan.own.peak > GIB else ('MiB', 2**20)
    for name in dict.fromkeys(name for s in settings for name in s.memory):
        rows.append([f'{name}, {unit}', *(_number(s.memory.get(name, 0) / scale) for s in settings)])
    rows += [[f'peak of memory, {unit}', *(_number(s.peak / scale) + ('' if s.fits(plan.device) else ', too much')
                                           for s in settings)],
             ['TFLOP a step', *(_number(s.tflop) for s in settings)],
             ['seconds a step', *(_number(s.seconds) + (', the host is slower' if s.bound_by_host else '')
                                  for s in settings)],
             ['images a second', *(_number(s.images_per_second) for s in settings)],
             _hours(plan, settings)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return '\n'.join('  ' + '  '.join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def _hours(plan: Plan, settings: list[Setting]) -> list[str]:
    steps = plan.training.steps or 1000
    return [f'hours for {steps:,} steps', *(_number(steps * s.seconds / 3600) for s in settings)]


def _advice(plan: Plan) -> list[str]:
    """Return sentences on what to set."""
    own, proposed, sentences = plan.own, plan.proposed, []
    if proposed is None:
        room = plan.device.memory / GIB
        sentences.append(f'Nothing fits into {room:.1f} GiB, not even batch 1 with checkpointing=full and a cache: '
                         'take a smaller resolution, a smaller adapter, an 8-bit optimizer or another device.')
    elif proposed != own:
        options = {'train_dataloader.batch_size': (own.batch_size, proposed.batch_size),
                   'optim_wrapper.accumulative_counts': (own.accumulation, proposed.accumulation),
                   'speed.checkpointing': (own.checkpointing, proposed.checkpointing)}
        changed = [f'{key}={new}' for key, (old, new) in options.items() if old != new]
        changed += ['cache=FOLDER'] if proposed.cached and not own.cached else []
        why = (f'The same samples a step, {own.seconds / proposed.seconds:.2f} times as fast'
               if own.fits(plan.device) else 'This config does not fit; with the same samples a step this does')
        sentences.append(f'{why}:\n  --cfg-options {" ".join(changed)}')
    cached = proposed or own
    if plan.counts.encoders and cached.cached:
        without, gib = plan.uncached(cached), plan.weights.encoders / GIB
        names = ', '.join(name.replace('_', ' ') for name in plan.counts.encoders)
        sentences.append(f'A cache, once it is filled, saves {without.seconds - cached.seconds:.3g} of '
                         f'{without.seconds:.3g} seconds a step and {gib:.2f} GiB of weights ({names}).')
    if plan.training.steps is None:
        sentences.append('train_cfg counts passes over the data, whose length is not read: hours are those of 1,000 '
                         'steps.')
    return sentences


def _millions(number: int) -> str:
    return f'{number / 1e6:,.1f} M'


def _number(value: float) -> str:
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
